r"""Compare matchers on pairs of images with keypoints.

    python -m pipelines.evaluate_matches distill-demo
    python -m pipelines.evaluate_matches spair --pairs.uri /data/SPair-71k --output s3://BUCKET/evaluations/spair
    python -m pipelines.evaluate_matches views --uris s3://d2f/runs/a/model s3://d2f/runs/b/model --output s3://d2f/ab

Writes points.parquet, scores.json, report.html and quarantine.parquet (which pairs were left out, and why), and a run
in MLflow. The same command resumes a killed job.
"""

from typing import Any

from d2f_core.correspondence.evaluate.config import (
    EvaluateMatchesConfig,
    MatcherChoice,
    MatcherGateConfig,
    ViewPairsConfig,
)
from d2f_core.data.sources.config import PairSource
from pipelines.cli import run_job
from pipelines.cluster import connect
from pipelines.embed_images import DINO, DINO_B, DINO_S, LITE0
from pipelines.names import MATCHER

RUNS = "s3://d2f/runs"

EVALUATE_MATCHES = {
    "distill-demo": EvaluateMatchesConfig(
        matchers=(
            MatcherChoice(name="teacher EfficientNet-Lite0", teachers=(LITE0,)),
            MatcherChoice(name="teacher DINOv2-S", teachers=(DINO,)),
            MatcherChoice(name="both teachers", teachers=(LITE0, DINO), shares=(0.7, 0.3)),
            MatcherChoice(name="untrained at 224 px", uri=DINO_S, layers=11, size=224),
            MatcherChoice(name="distilled at 224 px", uri=f"{RUNS}/distill-demo/model"),
            MatcherChoice(name="control at 224 px", uri=f"{RUNS}/control-demo/model"),
            MatcherChoice(name="refined at 224 px", uri=f"models:/{MATCHER}@candidate"),
        ),
        gate=MatcherGateConfig(candidate="refined at 224 px", must_beat=("untrained at 224 px",)),
        views=ViewPairsConfig(views="s3://d2f/datasets/views", split="test", per_range=40),
        output="s3://d2f/evaluations/distill-demo", num_actors=2,
    ),
    "spair": EvaluateMatchesConfig(
        matchers=(
            MatcherChoice(name="DINOv2-B", uri=DINO_B.uri, size=434),
            MatcherChoice(name="student", uri="s3://BUCKET/runs/distilldift/model"),
        ),
        pairs=PairSource(uri="/data/SPair-71k", splits=("test",)),
        output="s3://BUCKET/evaluations/spair", gpus_per_actor=1, num_actors=2, batch_size=16,
    ),
    "own": EvaluateMatchesConfig(
        uris=(f"models:/{MATCHER}@candidate",), pairs=PairSource(uri="s3://BUCKET/pairs.jsonl"),
        output="s3://BUCKET/evaluations/own",
    ),
    "views": EvaluateMatchesConfig(
        uris=(f"{RUNS}/distill-demo/model", f"{RUNS}/refine-demo/model"), size=224,
        views=ViewPairsConfig(views="s3://d2f/datasets/views", split="test", per_range=40),
        output="s3://d2f/evaluations/views", num_actors=2,
    ),
}  # fmt: skip


def check(config: EvaluateMatchesConfig) -> None:
    from d2f_core.correspondence.evaluate.gate import pinned
    from d2f_core.correspondence.evaluate.job import check_matches, check_trained
    from d2f_core.storage import check_reachable

    for uri in (config.views.views or config.pairs.uri, *reads(config).values()):
        check_reachable(uri)
    check_reachable(config.output, write=True)
    check_trained(config)
    check_matches(pinned(config)[0])


def reads(config: EvaluateMatchesConfig) -> dict[str, str]:
    """The URIs of matchers and teachers, by what they are called in messages."""
    found = {f"matchers.{matcher.name}.uri": matcher.uri for matcher in config.compared if matcher.uri}
    return found | {f"{each.name}.uri": each.uri for choice in config.compared for each in choice.teachers if each.uri}


def main(config: EvaluateMatchesConfig) -> dict[str, Any]:
    """Compare, and return what scores.json holds."""
    from d2f_core.correspondence.evaluate.job import evaluate_matches

    check(config)
    connect(reads={"pairs": config.views.views or config.pairs.uri, **reads(config)}, writes={"output": config.output})
    return evaluate_matches(config)


if __name__ == "__main__":
    run_job("evaluate_matches", EVALUATE_MATCHES, main, check)
