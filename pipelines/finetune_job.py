"""A checked finetuning: its plan, its identity, and the export of its last checkpoint."""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from d2f_core import storage
from d2f_core.data.manifest import Manifest
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.flow.estimate.job import worker_bytes
from d2f_core.flow.latents import caption_rules, check_fingerprint
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import BaseModel, describe_base, described_copy
from d2f_core.model.latent_task import check_networks, check_start_captions
from d2f_core.tracking import check_tracking, pin_model, resolve_model
from d2f_core.train.checkpoint import Checkpoint, candidates, list_checkpoints
from d2f_core.train.config import TrainConfig
from pipelines.checkpoint_export import default_weights, write_model
from pipelines.cli import from_yaml
from pipelines.configs import FinetuneConfig
from pipelines.finetune_task import build_task, check_task, make_plan
from pipelines.latent_versions import begun_with, chosen_tables
from pipelines.training import TrainingJob

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, kw_only=True)
class CheckedFinetune:
    """A finetuning that was found to work, as far as configs and the headers of weights tell."""

    config: FinetuneConfig
    base: BaseModel
    """Described: weights on S3 stay there."""
    manifests: list[Manifest]
    plan: StreamPlan

    @property
    def identity(self) -> str:
        """Hash of everything that a checkpoint and this run must have in common; reads the whole base to hash it."""
        return self.config.identity(self.base.content_hash, self.manifests)

    def job(self) -> FinetuneJob:
        """The job to run, which the base's hash belongs to."""
        return FinetuneJob(
            config=self.config,
            build_task=functools.partial(build_task, self.config, self.base.content_hash, self.plan),
            plan=self.plan,
            identity=self.identity,
            base=self.base,
            manifests=self.manifests,
        )


def check_finetune(config: FinetuneConfig) -> CheckedFinetune:
    """Refuse what cannot work, before anything is started. No weights are loaded, and of a base on S3 only the headers
    and the autoencoder are read; all of it if the output holds checkpoints, or the latents are pairs.
    """
    given = {"model.base": config.model.base, "latents": config.latents, "output": config.output, "name": config.name}
    for name, value in given.items():
        if not value:  # in recipes for one's own images
            raise ValueError(f"{name} is empty. Give --{name} {'NAME' if name == 'name' else 'URI'}.")
    storage.check_reachable(config.model.base)
    storage.check_reachable(config.latents)
    storage.check_reachable(config.output, write=True)
    base = describe_base(config.model.base).read_as(config.model.base_prediction)
    manifests = chosen_tables(config)
    logger.info(
        "%s: %s; not probed here, the first worker compares it with the weights", base.uri, base.prediction_type
    )
    captions = caption_rules(manifests, config.model.captions)
    config = replace(config, model=replace(config.model, captions=captions))
    check_networks(base, config.model)
    autoencoder = autoencoder_fingerprint(base)
    for manifest in manifests:
        check_fingerprint(manifest, autoencoder)
        check_task(manifest, config.model.task)
    plan = make_plan(config, base, manifests)
    check_tracking()
    config = replace(config, model=replace(config.model, start=pin_model(config.model.start)))
    if config.model.start:
        check_start_captions(described_copy(resolve_model(config.model.start)).path, config.model)
    if begun := list_checkpoints(config.output):
        config = _as_begun(config)
        manifests = begun_with(config, base.content_hash, begun[-1].manifest.identity)
        plan = make_plan(config, base, manifests)
    checked = CheckedFinetune(config=config, base=base, manifests=manifests, plan=plan)
    if begun:
        candidates(config.output, checked.identity)  # raises if the output holds another training
    return checked


def _as_begun(config: FinetuneConfig) -> FinetuneConfig:
    """The config with the naive target of the run in its output, if that is data_minus_noise: before the target was a
    field, all runs were so, and the command that began one goes on with it.
    """
    place = storage.join(config.output, "config.yaml")
    if config.model.objective != "flow_matching" or not storage.exists(place):
        return config
    begun = from_yaml(FinetuneConfig, storage.read_bytes(place).decode(), source=place).model.naive_target
    if begun != "data_minus_noise" or begun == config.model.naive_target:
        return config  # another difference is refused by the checkpoints' identity
    logger.warning("%s began with naive_target=%s and goes on so; for another give a new output", place, begun)
    return replace(config, model=replace(config.model, naive_target=begun))
