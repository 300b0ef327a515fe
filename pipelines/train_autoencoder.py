"""Train an autoencoder, or a base model's decoder, on a table: `python -m pipelines.train_autoencoder emoji`. The same
command again resumes.

At the end `OUTPUT/vae/` is a diffusers AutoencoderKL with its scaling factor, in fp16; or `OUTPUT/base/` the base model
with its decoder trained on, the encoder as it was.
"""

import functools
from dataclasses import dataclass

from d2f_core import storage
from d2f_core.data.manifest import read_manifest
from d2f_core.train.checkpoint import Checkpoint, candidates
from pipelines.autoencoder_task import begins_with, build_task, columns, export
from pipelines.cli import run_job
from pipelines.configs import TrainAutoencoderConfig
from pipelines.training import TrainingJob, train


@dataclass(frozen=True, kw_only=True)
class AutoencoderJob(TrainingJob):
    config: TrainAutoencoderConfig

    def export(self, last: Checkpoint) -> str:
        return export(self.config, last)


def check(config: TrainAutoencoderConfig) -> AutoencoderJob:
    """Refuse what cannot work, before anything is started."""
    storage.check_reachable(config.images)
    storage.check_reachable(config.output, write=True)
    manifest = read_manifest(config.images)
    plan = config.plan(manifest, columns(manifest))
    identity = config.identity(begins_with(config), manifest)
    candidates(config.output, identity)  # refuses the output of another training
    return AutoencoderJob(config=config, build_task=functools.partial(build_task, config), plan=plan, identity=identity)


def main(config: TrainAutoencoderConfig) -> str:
    """Returns where the result is."""
    return train(check(config)).model


if __name__ == "__main__":
    from pipelines.recipes import AUTOENCODER

    run_job("train_autoencoder", AUTOENCODER, main, check)
