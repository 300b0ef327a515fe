r"""Compare a model with champion and base, write a report, and promote the model when it passes the gate.

    python -m pipelines.evaluate quickstart --output s3://d2f/evaluations/flow-3
    python -m pipelines.evaluate quickstart --candidate /models/mine --champion "" --no-promote ...

The same command resumes a killed job.
"""

from typing import TYPE_CHECKING

from d2f_core.flow.evaluate.config import EvaluateConfig
from pipelines.cli import run_job
from pipelines.cluster import connect
from pipelines.names import CAPTIONS, EMOJI_SD, EVALUATIONS, FLOW_MODEL, OPENMOJI_FEW, QUICKSTART

if TYPE_CHECKING:
    from d2f_core.evaluation.gate import Verdict

EVALUATE = {
    # Outputs of `make quickstart`: every caption of its drawings as prompts, and the drawings as reference.
    "quickstart": EvaluateConfig(
        candidate=f"models:/{FLOW_MODEL}@candidate",
        base=EMOJI_SD,
        prompts=f"{QUICKSTART}/{CAPTIONS}",
        reference=OPENMOJI_FEW,
        output="s3://d2f/evaluations/quickstart",
        evaluations=EVALUATIONS,
    )
}


def check(config: EvaluateConfig) -> None:
    from d2f_core.flow.evaluate.job import check_evaluate

    check_evaluate(config)


def main(config: EvaluateConfig) -> "Verdict":
    from d2f_core.flow.evaluate.job import check_evaluate, evaluate

    job = check_evaluate(config)
    names = ("candidate", "champion", "base", "reference")
    features = {"score.features": config.score.features, "score.clip": config.score.clip}
    reads = {name: getattr(config, name) for name in names} | features
    connect(reads=reads, writes={"output": config.output})
    return evaluate(job)


if __name__ == "__main__":
    run_job("evaluate", EVALUATE, main, check)
