r"""Make a table of pairs of images with their teachers' match targets, for the distillation of a student.

    python -m pipelines.embed_pairs views-retrieval       # the pairs that mine_pairs has found
    python -m pipelines.embed_pairs distilldift-weak --pairs.uri s3://d2f/SPair-71k --features s3://d2f/spair \\
        --output s3://d2f/pairs/spair

The same command resumes a killed job, and does nothing once the table is complete.
"""

import logging

from d2f_core.correspondence.config import TargetConfig
from d2f_core.correspondence.targets.config import EmbedPairsConfig
from d2f_core.data.sources.config import PairSource
from pipelines.cli import run_job
from pipelines.cluster import connect

PUBLISHED = TargetConfig(finer=1, cycle=False)
"""Targets as in arXiv:2412.03512."""

EMBED_PAIRS = {
    "views-retrieval": EmbedPairsConfig(
        features="s3://d2f/features/views", mined="s3://d2f/pairs/views-retrieval",
        targets=TargetConfig(shares={"lite0": 0.85, "dino": 0.15}), output="s3://d2f/pairs/views-targets", num_actors=2,
    ),
    "distilldift": EmbedPairsConfig(
        features="s3://BUCKET/features", mined="s3://BUCKET/retrieval", targets=PUBLISHED, output="s3://BUCKET/pairs",
        num_actors=8, gpus_per_actor=1, num_readers=16,
    ),
    "distilldift-weak": EmbedPairsConfig(
        features="s3://BUCKET/features", pairs=PairSource(uri="s3://BUCKET/SPair-71k", kind="spair", splits=("trn",)),
        targets=PUBLISHED, output="s3://BUCKET/pairs", num_actors=8, gpus_per_actor=1, num_readers=16,
    ),
}  # fmt: skip

logger = logging.getLogger(__name__)


def check(config: EmbedPairsConfig) -> None:
    from d2f_core.correspondence.targets.check import check_embed_pairs

    check_embed_pairs(config)


def main(config: EmbedPairsConfig) -> None:
    from d2f_core.batch.table_job import make_table
    from d2f_core.correspondence.targets.check import check_embed_pairs, dropped_share

    job = check_embed_pairs(config)
    places = {"features": config.features, "mined": config.mined, "pairs.uri": config.pairs.uri}
    connect(reads={**places, "pairs.images": config.pairs.images or ""}, writes={"output": config.output})
    manifest = make_table(job)
    share, kept = dropped_share(config.output, manifest), config.targets.kept
    logger.info("%s: the %d kept of each token hold %.1f %% of the probability", config.output, kept, 100 * (1 - share))


if __name__ == "__main__":
    run_job("embed_pairs", EMBED_PAIRS, main, check)
