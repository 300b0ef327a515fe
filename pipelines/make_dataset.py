"""Write the captioned emoji set as an image table.

python -m pipelines.make_dataset twemoji --output s3://d2f/datasets/twemoji
python -m pipelines.make_dataset openmoji --output /data/openmoji --size 128 --subset all
"""

import logging

from d2f_core.data.emoji import MakeDatasetConfig, make_dataset
from d2f_core.storage import check_reachable
from pipelines.cli import run_job

RECIPES = {
    "twemoji": MakeDatasetConfig(output="s3://d2f/datasets/twemoji", style="twemoji"),
    "openmoji": MakeDatasetConfig(output="s3://d2f/datasets/openmoji", style="openmoji"),
    "openmoji-starter": MakeDatasetConfig(
        output="s3://d2f/datasets/openmoji-starter", style="openmoji", subset="starter", fit="drawing"
    ),
    "both": MakeDatasetConfig(output="s3://d2f/datasets/emoji-both", style="both"),
}

logger = logging.getLogger(__name__)


def main(config: MakeDatasetConfig) -> None:
    check_reachable(config.output, write=True)
    manifest, written = make_dataset(config)
    logger.info("%s: %d images, %s", config.output, manifest.num_rows, "written" if written else "complete already")


if __name__ == "__main__":
    run_job("make_dataset", RECIPES, main)
