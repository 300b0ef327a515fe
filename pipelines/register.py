"""Register a training's model in MLflow: `python -m pipelines.register emoji-flow --run s3://d2f/runs/emoji-lora`."""

from d2f_core.flow.publish.config import RegisterConfig
from d2f_core.flow.publish.job import register
from d2f_core.tracking import ModelVersionInfo
from pipelines.cli import run_job
from pipelines.names import FLOW_MODEL

REGISTER = {"emoji-flow": RegisterConfig(run="s3://d2f/runs/emoji-lora", name=FLOW_MODEL)}


def main(config: RegisterConfig) -> ModelVersionInfo:
    return register(config)


if __name__ == "__main__":
    run_job("register", REGISTER, main)
