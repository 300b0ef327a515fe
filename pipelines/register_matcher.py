"""Register a trained matcher in MLflow: `python -m pipelines.register_matcher matcher --run s3://d2f/runs/refine-demo`."""

from typing import TYPE_CHECKING

from d2f_core.correspondence.publish.config import RegisterMatcherConfig
from pipelines.cli import run_job
from pipelines.names import MATCHER

if TYPE_CHECKING:
    from d2f_core.tracking import ModelVersionInfo

REGISTER_MATCHER = {"matcher": RegisterMatcherConfig(run="s3://d2f/runs/refine-demo", name=MATCHER)}


def check(config: RegisterMatcherConfig) -> None:
    from d2f_core.correspondence.publish.job import check_register

    check_register(config)


def main(config: RegisterMatcherConfig) -> "ModelVersionInfo":
    from d2f_core.correspondence.publish.job import check_register, register

    return register(check_register(config))


if __name__ == "__main__":
    run_job("register_matcher", REGISTER_MATCHER, main, check)
