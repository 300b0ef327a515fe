"""Write the captioned emoji set as an image table, or rendered scenes with their depth as a depth table.

python -m pipelines.make_dataset twemoji --output s3://d2f/datasets/twemoji
python -m pipelines.make_dataset openmoji --output /data/openmoji --size 128 --subset all
python -m pipelines.make_dataset depth --num-scenes 10000
python -m pipelines.make_dataset depth-test
"""

import logging

from d2f_core.data.datasets.config import MakeDatasetConfig, MakeDepthConfig
from pipelines.cli import run_job
from pipelines.cluster import connect
from pipelines.names import OPENMOJI_FEW, OPENMOJI_TEST, OPENMOJI_TRAIN

MAKE_DATASET = {
    "twemoji": MakeDatasetConfig(output="s3://d2f/datasets/twemoji", style="twemoji"),
    "openmoji": MakeDatasetConfig(output="s3://d2f/datasets/openmoji", style="openmoji"),
    "openmoji-starter": MakeDatasetConfig(
        output="s3://d2f/datasets/openmoji-starter", style="openmoji", subset="starter", fit="drawing"
    ),
    "openmoji-few": MakeDatasetConfig(output=OPENMOJI_FEW, style="openmoji", subset="few", fit="drawing"),
    # Every drawing, in two parts without one in common: to train on, and to judge what was trained.
    "openmoji-train": MakeDatasetConfig(
        output=OPENMOJI_TRAIN, style="openmoji", subset="all", fit="drawing", split="train"
    ),
    "openmoji-test": MakeDatasetConfig(
        output=OPENMOJI_TEST, style="openmoji", subset="all", fit="drawing", split="test"
    ),
    "both": MakeDatasetConfig(output="s3://d2f/datasets/emoji-both", style="both"),
    "depth": MakeDepthConfig(output="s3://d2f/datasets/depth", split="train", num_scenes=16_384, mirrored=True),
    "depth-test": MakeDepthConfig(output="s3://d2f/datasets/depth-test", split="test", num_scenes=400),
}

logger = logging.getLogger(__name__)


def check(config: MakeDatasetConfig | MakeDepthConfig) -> None:
    from d2f_core.storage import check_reachable

    check_reachable(config.output, write=True)
    if isinstance(config, MakeDepthConfig):
        from d2f_core.data.datasets.depth_table import depth_inputs

        depth_inputs(config)


def main(config: MakeDatasetConfig | MakeDepthConfig) -> None:
    check(config)
    if isinstance(config, MakeDepthConfig):
        from d2f_core.data.datasets.depth_table import make_depth_dataset

        connect(reads={}, writes={"output": config.output})
        manifest, written = make_depth_dataset(config)
    else:
        from d2f_core.data.datasets.emoji import make_dataset

        manifest, written = make_dataset(config)
    logger.info("%s: %d images, %s", config.output, manifest.num_rows, "written" if written else "complete already")


if __name__ == "__main__":
    run_job("make_dataset", MAKE_DATASET, main, check)
