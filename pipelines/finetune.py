"""Train a latent model: `python -m pipelines.finetune emoji-lora --train.num-steps 200`.

The same command resumes a stopped training.
"""

from typing import TYPE_CHECKING

from pipelines.cli import run_job
from pipelines.configs import FinetuneConfig

if TYPE_CHECKING:
    from pipelines.finetune_job import CheckedFinetune
    from pipelines.training import TrainingResult


def check(config: FinetuneConfig) -> "CheckedFinetune":
    from pipelines.finetune_job import check_finetune

    return check_finetune(config)


def main(config: FinetuneConfig) -> "TrainingResult":
    """Train to the end and export the model."""
    from pipelines.training import train

    return train(check(config).job()).complete()


if __name__ == "__main__":
    from pipelines.recipes import FINETUNE

    run_job("finetune", FINETUNE, main, check)
