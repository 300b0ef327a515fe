r"""Predict the depth of images: 16-bit PNG, .npy and coloured previews, with an index table.

    python -m pipelines.predict_depth depth --source.uri s3://photos --output s3://d2f/depth/photos
    python -m pipelines.predict_depth depth --model /models/mine --steps 1 2 4 10 --source.uri ... --output ...

The same command again goes on where a killed job was, and does nothing once all maps are there.
"""

import ray

from d2f_core.data.manifest import Manifest
from d2f_core.data.sources.config import ImageSource
from d2f_core.flow.depth.config import PredictDepthConfig
from d2f_core.flow.depth.job import check_predict_depth, predict_depth
from pipelines.cli import run_job
from pipelines.names import DEPTH_MODEL

PREDICT_DEPTH = {
    "depth": PredictDepthConfig(
        source=ImageSource(uri="s3://d2f/datasets/depth-test"),
        model=f"models:/{DEPTH_MODEL}@candidate",
        output="s3://d2f/predictions/depth",
        steps=(1, 2, 4, 10),
    )
}


def main(config: PredictDepthConfig) -> Manifest:
    job = check_predict_depth(config)
    ray.init(ignore_reinit_error=True)
    return predict_depth(job)


if __name__ == "__main__":
    run_job("predict_depth", PREDICT_DEPTH, main, check_predict_depth)
