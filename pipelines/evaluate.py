r"""Compare a model with champion and base, write a report, and promote the model when it passes the gate.

    python -m pipelines.make_dataset openmoji-test
    python -m pipelines.evaluate quickstart --output s3://d2f/evaluations/flow-3
    python -m pipelines.evaluate quickstart --candidate /models/mine --champion "" --no-promote ...

The same command resumes a killed job.
"""

import tempfile
from typing import TYPE_CHECKING

from d2f_core.flow.evaluate.config import EvaluateConfig
from pipelines.cli import run_job
from pipelines.cluster import connect
from pipelines.names import EMOJI_SD, FLOW_MODEL, OPENMOJI_TEST

if TYPE_CHECKING:
    from d2f_core.evaluation.gate import Verdict

EVALUATE = {
    # Drawings that no training of the quickstart has seen, and their captions.
    "quickstart": EvaluateConfig(
        candidate=f"models:/{FLOW_MODEL}@candidate",
        base=EMOJI_SD,
        reference=OPENMOJI_TEST,
        output="s3://d2f/evaluations/quickstart",
        evaluations=(2, 4),
    )
}


def check(config: EvaluateConfig) -> None:
    from d2f_core.flow.evaluate.job import check_evaluate

    with tempfile.TemporaryDirectory() as scratch:  # what is made of empty fields is not left at the output
        check_evaluate(config, scratch)


def main(config: EvaluateConfig) -> "Verdict":
    from d2f_core.flow.evaluate.job import check_evaluate, evaluate

    job = check_evaluate(config)
    config = job.config  # with what was not given filled in
    names = ("candidate", "champion", "base", "reference", "training")
    features = {"score.features": config.score.features, "score.clip": config.score.clip}
    reads = {name: getattr(config, name) for name in names} | features
    connect(reads=reads, writes={"output": config.output})
    return evaluate(job)


if __name__ == "__main__":
    run_job("evaluate", EVALUATE, main, check)
