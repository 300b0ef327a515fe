"""Train an autoencoder, or a base model's decoder, on a table: `python -m pipelines.train_autoencoder emoji`. The same
command resumes a stopped training.

At the end `OUTPUT/vae/` is a diffusers AutoencoderKL with its scaling factor, in fp16; or `OUTPUT/base/` is the base
model with its decoder trained further, and its encoder unchanged.
"""

from typing import TYPE_CHECKING

from pipelines.cli import run_job
from pipelines.configs import TrainAutoencoderConfig

if TYPE_CHECKING:
    from pipelines.autoencoder_job import AutoencoderJob


def check(config: TrainAutoencoderConfig) -> "AutoencoderJob":
    from pipelines.autoencoder_job import check_autoencoder

    return check_autoencoder(config)


def main(config: TrainAutoencoderConfig) -> str:
    """Train to the end and export; returns the directory of the result."""
    from pipelines.training import train

    return train(check(config)).complete().model


if __name__ == "__main__":
    from pipelines.recipes import AUTOENCODER

    run_job("train_autoencoder", AUTOENCODER, main, check)
