"""A checked training of an autoencoder, and the export of its last checkpoint."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from d2f_core import storage
from d2f_core.data.manifest import read_manifest
from d2f_core.model.base import describe_base
from d2f_core.train.checkpoint import Checkpoint, candidates
from pipelines.autoencoder_task import begins_with, build_task, columns, export
from pipelines.configs import TrainAutoencoderConfig
from pipelines.training import TrainingJob


@dataclass(frozen=True, kw_only=True)
class AutoencoderJob(TrainingJob):
    config: TrainAutoencoderConfig

    @property
    def reads(self) -> Mapping[str, str]:
        return {name: getattr(self.config, name) for name in ("images", "base", "vae_config")}

    def export(self, last: Checkpoint) -> str:
        return export(self.config, last)


def check_autoencoder(config: TrainAutoencoderConfig) -> AutoencoderJob:
    """Refuse what cannot work, before anything is started."""
    storage.check_reachable(config.base or config.vae_config)
    storage.check_reachable(config.images)
    storage.check_reachable(config.output, write=True)
    manifest = read_manifest(config.images)
    plan = config.plan(manifest, columns(manifest))
    begun_with = begins_with(config, describe_base)
    identity = config.identity(begun_with, manifest)
    candidates(config.output, identity)  # refuses the output of another training
    build = functools.partial(build_task, config, begun_with)
    return AutoencoderJob(config=config, build_task=build, plan=plan, identity=identity)
