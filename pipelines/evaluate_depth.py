r"""Compare predicted depth with the ground truth: errors with intervals, baselines and a gate, as JSON and pictures.

    python -m pipelines.evaluate_depth depth
    python -m pipelines.evaluate_depth depth --predictions s3://d2f/predictions/a s3://d2f/predictions/b --titles a b
    python -m pipelines.evaluate_depth depth --gate.candidate models:/emoji-depth/2

The same command resumes a killed evaluation.
"""

import logging
from typing import Any

from d2f_core.flow.depth.config import EvaluateDepthConfig
from pipelines.cli import run_job
from pipelines.cluster import connect

logger = logging.getLogger(__name__)

EVALUATE_DEPTH = {
    "depth": EvaluateDepthConfig(
        predictions=("s3://d2f/predictions/depth",),
        truth="s3://d2f/datasets/depth-test",
        train="s3://d2f/datasets/depth",
        output="s3://d2f/evaluations/depth",
    )
}


def check(config: EvaluateDepthConfig) -> None:
    from d2f_core.flow.depth.evaluation import check_evaluate_depth

    check_evaluate_depth(config)


def reads(config: EvaluateDepthConfig) -> dict[str, str]:
    """What the cluster's nodes read, by what it is called in messages."""
    tables = {"truth": config.truth, **({"train": config.train} if config.train else {})}
    return tables | {f"predictions[{number}]": uri for number, uri in enumerate(config.predictions)}


def main(config: EvaluateDepthConfig) -> dict[str, Any]:
    from d2f_core.flow.depth.evaluation import METRICS_NAME, check_evaluate_depth, evaluate_depth, in_words

    job = check_evaluate_depth(config)
    connect(reads=reads(config), writes={"output": config.output})
    results = evaluate_depth(job)
    logger.info("%s", in_words(results))
    for role, values in results["metrics"]["abs_rel"]["values"].items():
        logger.info("AbsRel, %s: %s", role, {count: round(one["value"], 4) for count, one in values.items()})
    logger.info("%s/%s", config.output, METRICS_NAME)
    return results


if __name__ == "__main__":
    run_job("evaluate_depth", EVALUATE_DEPTH, main, check)
