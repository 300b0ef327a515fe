"""Distil teachers into a student for semantic correspondence: `python -m pipelines.distill distill-demo`.

The same command resumes a stopped training.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from d2f_core.correspondence.config import DistillationConfig, MatcherConfig, MultiViewConfig, StudentConfig
from d2f_core.correspondence.estimate.config import EstimateDistillConfig
from d2f_core.correspondence.evaluate.config import ViewPairsConfig
from d2f_core.train.config import EmaConfig, TrainConfig
from pipelines.cli import run_job
from pipelines.distill_config import DistillConfig
from pipelines.embed_images import EMBED_IMAGES
from pipelines.embed_pairs import PUBLISHED

if TYPE_CHECKING:
    from pipelines.distill_job import CheckedDistill
    from pipelines.training import TrainingResult

SHARES = {"lite0": 0.85, "dino": 0.15}
VIEWS, FEATURES = "s3://d2f/datasets/views", "s3://d2f/features/views"
SMALL = StudentConfig(base="s3://d2f/models/dinov2-s", layers=11, first_block=5, dropout=0.0)
DEMO = TrainConfig(
    ema=EmaConfig(decay=0.0),
    num_workers=1, global_batch_size=8, micro_batch_size=8, num_steps=240, learning_rate=5e-3, weight_decay=0.05,
    decay="cosine", warmup_steps=10, window_rows=32, lanes=2, checkpoint_every=60,
    evaluate_every=120, log_every=10,
)  # fmt: skip
PAPER = TrainConfig(
    num_workers=8, cpus_per_worker=4, use_gpu=True, precision="bf16", zero_stage=2, global_batch_size=64,
    micro_batch_size=8, num_steps=20_000, learning_rate=1e-4, weight_decay=0.05, window_rows=64,
    checkpoint_every=1000, evaluate_every=0,
)  # fmt: skip

DISTILL = {
    "distill-demo": DistillConfig(
        matcher=MatcherConfig(student=SMALL, distillation=DistillationConfig(shares=SHARES)),
        features=FEATURES, output="s3://d2f/runs/distill-demo", matching_size=224,
        pairs=ViewPairsConfig(views=VIEWS), train=DEMO, name="distill-demo",
    ),
    "refine-demo": DistillConfig(
        matcher=MatcherConfig(
            student=SMALL,
            distillation=DistillationConfig(weight=2.0, shares=SHARES),
            multi_view=MultiViewConfig(weight=1.0),
        ),
        features=FEATURES, start="s3://d2f/runs/distill-demo/model", output="s3://d2f/runs/refine-demo",
        bucket="things", matching_size=224, pairs=ViewPairsConfig(views=VIEWS), name="refine-demo",
        train=replace(DEMO, num_steps=80, learning_rate=2e-3, evaluate_every=40, checkpoint_every=40),
    ),
    "control-demo": DistillConfig(
        matcher=MatcherConfig(student=SMALL, distillation=DistillationConfig(shares=SHARES)),
        features=FEATURES, start="s3://d2f/runs/distill-demo/model", output="s3://d2f/runs/control-demo",
        matching_size=224, pairs=ViewPairsConfig(views=VIEWS), name="control-demo",
        train=replace(DEMO, num_steps=80, learning_rate=2e-3, evaluate_every=40, checkpoint_every=40),
    ),
    "distilldift": DistillConfig(
        matcher=MatcherConfig(
            student=StudentConfig(base="/models/dinov2-with-registers-base"),
            distillation=DistillationConfig(temperature=0.01, finer=1, cycle=False),
        ),
        features="s3://BUCKET/features", output="s3://BUCKET/runs/distilldift", normalisation="none", train=PAPER,
        name="distilldift",
    ),
    "distilldift-weak": DistillConfig(
        matcher=MatcherConfig(
            student=StudentConfig(base="/models/dinov2-with-registers-base"),
            distillation=DistillationConfig(temperature=0.01, finer=1, cycle=False),
        ),
        features="s3://BUCKET/pairs", output="s3://BUCKET/runs/distilldift-weak", normalisation="none",
        train=replace(PAPER, num_steps=8_334), name="distilldift-weak",
    ),
    "views-retrieval": DistillConfig(
        matcher=MatcherConfig(student=SMALL, distillation=DistillationConfig(shares=SHARES)),
        features="s3://d2f/pairs/views-targets", output="s3://d2f/runs/views-retrieval",
        pairs=ViewPairsConfig(views=VIEWS), train=DEMO, name="views-retrieval",
    ),
    "views-clusters": DistillConfig(
        matcher=MatcherConfig(student=SMALL, distillation=DistillationConfig(shares=SHARES)),
        features=FEATURES, bucket="retrieval", clusters="s3://d2f/pairs/views-retrieval/clusters",
        output="s3://d2f/runs/views-clusters", pairs=ViewPairsConfig(views=VIEWS), train=DEMO, name="views-clusters",
    ),
}  # fmt: skip

ARCHITECTURES = {"sdxl_turbo": "sdxl", "dino": "dinov2-b"}
"""What the teachers of real weights are built like."""


def _estimate(name: str, **fields: Any) -> EstimateDistillConfig:
    matcher = DISTILL[name].matcher
    return EstimateDistillConfig(
        matcher=replace(matcher, student=replace(matcher.student, base=ARCHITECTURES["dino"])),
        teachers=tuple(replace(each, uri=ARCHITECTURES[each.name]) for each in EMBED_IMAGES["distilldift"].teachers),
        size=EMBED_IMAGES["distilldift"].size, train=DISTILL[name].train, **fields,
    )  # fmt: skip


ESTIMATE_DISTILL = {
    "distilldift": _estimate("distilldift"),
    # SPair-71k has 1,800 images, and 53,340 pairs to train on.
    "distilldift-weak": _estimate("distilldift-weak", images=1_800, pairs=53_340, targets=PUBLISHED),
}


def check(config: DistillConfig) -> "CheckedDistill":
    from pipelines.distill_job import check_distill

    return check_distill(config)


def main(config: DistillConfig) -> "TrainingResult":
    """Train to the end and export the matcher."""
    from pipelines.training import train

    return train(check(config).job()).complete()


if __name__ == "__main__":
    run_job("distill", DISTILL, main, check)
