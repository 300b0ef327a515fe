r"""Predict the depth of images: 16-bit PNG, .npy and coloured previews, with an index table.

    python -m pipelines.predict_depth depth --source.uri s3://photos --output s3://d2f/depth/photos
    python -m pipelines.predict_depth depth --model /models/mine --steps 1 2 4 10 --source.uri ... --output ...

The same command resumes a killed job, and does nothing once all maps exist.
"""

from typing import TYPE_CHECKING

from d2f_core.data.sources.config import ImageSource
from d2f_core.flow.depth.config import PredictDepthConfig
from pipelines.cli import run_job
from pipelines.cluster import connect
from pipelines.names import DEPTH_MODEL

if TYPE_CHECKING:
    from d2f_core.data.manifest import Manifest

PREDICT_DEPTH = {
    "depth": PredictDepthConfig(
        source=ImageSource(uri="s3://d2f/datasets/depth-test"),
        model=f"models:/{DEPTH_MODEL}@candidate",
        output="s3://d2f/predictions/depth",
        steps=(1, 2, 4, 10),
    )
}


def check(config: PredictDepthConfig) -> None:
    from d2f_core.flow.depth.job import check_predict_depth

    check_predict_depth(config)


def main(config: PredictDepthConfig) -> "Manifest":
    from d2f_core.flow.depth.job import check_predict_depth, predict_depth

    job = check_predict_depth(config)
    connect(reads={"source.uri": config.source.uri, "model": config.model}, writes={"output": config.output})
    return predict_depth(job)


if __name__ == "__main__":
    run_job("predict_depth", PREDICT_DEPTH, main, check)
