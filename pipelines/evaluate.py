r"""Measure a model beside champion and base, write a report, and promote it when it passes the gate.

    python -m pipelines.evaluate quickstart --output s3://d2f/evaluations/flow-3
    python -m pipelines.evaluate quickstart --candidate /models/mine --champion "" --no-promote ...

The same command again goes on where a killed job was.
"""

import ray

from d2f_core.inference.evaluate import check_evaluate, evaluate
from d2f_core.inference.evaluate_config import EvaluateConfig
from d2f_core.inference.gate import Verdict
from pipelines.cli import run_job


def main(config: EvaluateConfig) -> Verdict:
    job = check_evaluate(config)
    ray.init(ignore_reinit_error=True)
    return evaluate(job)


if __name__ == "__main__":
    from pipelines.workflow_recipes import EVALUATE

    run_job("evaluate", EVALUATE, main, check_evaluate)
