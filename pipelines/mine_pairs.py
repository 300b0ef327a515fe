r"""Pair images that look alike, by the embeddings of a table of features.

    python -m pipelines.mine_pairs views-retrieval        # of the views that embed_images has embedded
    python -m pipelines.mine_pairs distilldift --features s3://d2f/features/photos --output s3://d2f/pairs/photos

The same command resumes a killed job, and does nothing once the tables are complete.
"""

import logging

from d2f_core.correspondence.mine.config import MinePairsConfig
from pipelines.cli import run_job
from pipelines.cluster import connect

MINE_PAIRS = {
    "views-retrieval": MinePairsConfig(
        features="s3://d2f/features/views", column="features_dino", apart="mesh", cluster_size=8,
        output="s3://d2f/pairs/views-retrieval",
    ),
    "distilldift": MinePairsConfig(
        features="s3://BUCKET/features", cluster_size=8, output="s3://BUCKET/retrieval", num_tasks=8
    ),
}  # fmt: skip

logger = logging.getLogger(__name__)


def check(config: MinePairsConfig) -> None:
    from d2f_core.correspondence.mine.table import check_mine

    check_mine(config)


def main(config: MinePairsConfig) -> None:
    from d2f_core.correspondence.mine.table import check_mine, mine_pairs

    of = check_mine(config)
    connect(reads={"features": config.features}, writes={"output": config.output})
    manifest, written = mine_pairs(config, of)
    logger.info("%s: %d pairs, %s", config.output, manifest.num_rows, "written" if written else "complete already")


if __name__ == "__main__":
    run_job("mine_pairs", MINE_PAIRS, main, check)
