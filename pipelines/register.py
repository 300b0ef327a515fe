"""Register a training's model in MLflow: `python -m pipelines.register emoji-flow --run s3://d2f/runs/emoji-lora`."""

from typing import TYPE_CHECKING

from d2f_core.flow.publish.config import RegisterConfig
from pipelines.cli import run_job
from pipelines.names import FLOW_MODEL

if TYPE_CHECKING:
    from d2f_core.tracking import ModelVersionInfo

REGISTER = {"emoji-flow": RegisterConfig(run="s3://d2f/runs/emoji-lora", name=FLOW_MODEL)}


def check(config: RegisterConfig) -> None:
    from d2f_core.flow.publish.job import check_register

    check_register(config)


def main(config: RegisterConfig) -> "ModelVersionInfo":
    from d2f_core.flow.publish.job import check_register, register

    return register(check_register(config))


if __name__ == "__main__":
    run_job("register", REGISTER, main, check)
