"""A checked finetuning: its plan, its identity, and the export of its last checkpoint."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from d2f_core import storage
from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.flow.estimate.job import worker_bytes
from d2f_core.flow.latents import check_fingerprint
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import BaseModel, resolve_base
from d2f_core.tracking import check_tracking, pin_model
from d2f_core.train.checkpoint import Checkpoint, candidates
from d2f_core.train.config import TrainConfig
from pipelines.checkpoint_export import default_weights, write_model
from pipelines.configs import FinetuneConfig
from pipelines.finetune_task import build_task, check_task, make_plan
from pipelines.training import TrainingJob


@dataclass(frozen=True, kw_only=True)
class FinetuneJob(TrainingJob):
    config: FinetuneConfig
    """The config with aliases resolved to versions, so that a moving alias does not change a resumed training."""
    base: BaseModel
    manifests: list[Manifest]
    """Manifests of the tables to train on."""

    @property
    def reads(self) -> Mapping[str, str]:
        tables = {f"more_latents[{number}]": uri for number, uri in enumerate(self.config.more_latents)}
        model = {"model.base": self.config.model.base, "model.start": self.config.model.start}
        return {"latents": self.config.latents, **model, **tables}

    @property
    def tags(self) -> Mapping[str, str]:
        digests = " ".join(manifest.digest for manifest in self.manifests)
        base = self.base
        return {"d2f.base": base.uri, "d2f.base_sha256": base.content_hash, "d2f.latents_digest": digests}

    def worker_bytes(self, train: TrainConfig) -> int:
        return worker_bytes(self.base.path, self.config.model, train)

    def export(self, last: Checkpoint) -> str:
        target, weights = storage.join(self.config.output, "model"), default_weights(self.config)
        return write_model(self.config, self.base, self.manifests, last, target, weights=weights)


def check_finetune(config: FinetuneConfig) -> FinetuneJob:
    """Refuse what cannot work, before anything is started."""
    storage.check_reachable(config.model.base)
    storage.check_reachable(config.latents)
    storage.check_reachable(config.output, write=True)
    base, manifests = resolve_base(config.model.base), [read_manifest(uri) for uri in config.tables]
    autoencoder = autoencoder_fingerprint(base)
    for manifest in manifests:
        check_fingerprint(manifest, autoencoder)
        check_task(manifest, config.model.task)
    plan = make_plan(config, base, manifests)
    check_tracking()
    config = replace(config, model=replace(config.model, start=pin_model(config.model.start)))
    identity = config.identity(base.content_hash, manifests)
    candidates(config.output, identity)  # raises if the output holds another training
    return FinetuneJob(
        config=config,
        build_task=functools.partial(build_task, config, base.content_hash),
        plan=plan,
        identity=identity,
        base=base,
        manifests=manifests,
    )
