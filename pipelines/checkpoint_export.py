"""Exports a model artifact from a training's checkpoint; needs only files, no GPU, engine or Ray."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from d2f_core import storage
from d2f_core.data.manifest import Manifest
from d2f_core.flow.latents import noise_columns
from d2f_core.model.artifact import describe, upload_artifact
from d2f_core.model.base import BaseModel, describe_base
from d2f_core.model.config import SamplingDefaults
from d2f_core.model.latent_task import empty_network, joined_channels
from d2f_core.objective.schedule import flow_shift
from d2f_core.train.checkpoint import MANIFEST, Checkpoint, CheckpointError, iter_tensors
from d2f_core.train.selection import select
from pipelines.cli import from_yaml
from pipelines.configs import FinetuneConfig
from pipelines.export_config import CheckpointExportConfig
from pipelines.latent_versions import begun_with

logger = logging.getLogger(__name__)

KINDS = {"ema": "ema", "trained": "weights"}
"""Name of the weights for users -> kind of the tensors in a checkpoint."""
BASE_READING = "base_reading.json"
"""File of a training's output with what its first worker found the base to predict."""


@dataclass(frozen=True)
class _Found:
    """Everything that an export needs before a tensor is read."""

    config: FinetuneConfig
    base: BaseModel
    manifests: list[Manifest]
    checkpoint: Checkpoint
    weights: str


def check_checkpoint(config: CheckpointExportConfig) -> _Found:
    """Find run, base and checkpoint, and check that they belong together. Raises ValueError if the export cannot
    work.
    """
    for name in ("run", "output"):
        if not getattr(config, name):
            raise ValueError(f"{name} is empty. Give --{name} URI.")
    storage.check_reachable(config.run)
    storage.check_reachable(config.output, write=True)
    place = storage.join(config.run, "config.yaml")
    try:
        run = from_yaml(FinetuneConfig, storage.read_bytes(place).decode(), source=place)
    except FileNotFoundError:
        raise ValueError(f"{place!r} does not exist. Give --run the output of a finetuning.") from None
    found = select(config.run, config.step, run.train.retention)
    storage.check_reachable(config.base or run.model.base)
    base = describe_base(config.base or run.model.base).read_as(run.model.base_prediction)
    manifests = begun_with(run, base.content_hash, found.manifest.identity)
    if (identity := run.identity(base.content_hash, manifests)) != found.manifest.identity:
        raise CheckpointError(
            f"{found.uri} has the identity {found.manifest.identity[:12]}; config.yaml, base and latents as they are "
            f"now have {identity[:12]}. Put back those that it was trained with (--base, when the base moved)."
        )
    weights = config.weights or default_weights(run)
    if not found.manifest.tensors.get(KINDS[weights]):
        raise CheckpointError(f"{found.uri} holds no weights={weights!r}. Use --weights trained.")
    return _Found(run, base, manifests, found, weights)


def export_checkpoint(config: CheckpointExportConfig) -> str:
    """Write the model of one checkpoint to `config.output`, which is returned; repeating it writes the same bytes.

    Raises:
        ValueError: run, base or checkpoint is missing or damaged, they do not belong together, or one was deleted
            during the export.
    """
    found = check_checkpoint(config)
    checkpoint, base = found.checkpoint, found.base
    logger.info("%s: %s weights of step %d", checkpoint.uri, found.weights, checkpoint.manifest.step)
    try:
        return write_model(found.config, base, found.manifests, checkpoint, config.output, weights=found.weights)
    except CheckpointError:
        if storage.exists(storage.join(checkpoint.uri, MANIFEST)):
            raise
        raise CheckpointError(
            f"{checkpoint.uri} was deleted while it was read: the training goes on and keeps the newest only. Give a "
            "later step, or copy that directory first."
        ) from None


def write_model(
    config: FinetuneConfig,
    base: BaseModel,
    manifests: Sequence[Manifest],
    checkpoint: Checkpoint,
    target: str,
    *,
    weights: str,
) -> str:
    """Write the artifact of a checkpoint's "ema" or "trained" weights to `target`, one tensor at a time."""
    model, manifest = config.model, checkpoint.manifest
    training = {
        "latents": config.latents,
        "latents_digest": manifests[0].digest,
        "holdout_rows": config.holdout_rows,
        "step": manifest.step,
        "checkpoint": checkpoint.uri,
        "identity": manifest.identity,
        "weights": weights,
    }
    if noise_columns(manifests, lambda: base.content_hash):
        training["teacher"] = manifests[0].inputs["model"]
    reading = storage.join(config.output, BASE_READING)
    if storage.exists(reading):
        training["base_reading"] = json.loads(storage.read_bytes(reading))
    description = describe(
        base,
        objective=model.objective,
        naive_target=model.naive_target,
        captions=model.captions,
        method=model.method,
        sampling=_sampling(config, base, manifests[0]),
        training=training,
        task=model.task,
        joined_channels=joined_channels(base, model),
    )
    upload_artifact(target, empty_network(base, model), description, iter_tensors(checkpoint, KINDS[weights]))
    return target


def _sampling(config: FinetuneConfig, base: BaseModel, manifest: Manifest) -> SamplingDefaults:
    """How the model is sampled: as configured, at the size that it was trained on, and on a flow base at its shift."""
    shift = config.sampling.shift
    if base.is_flow and shift == SamplingDefaults().shift:
        shift = flow_shift(base.scheduler_config)
    return dataclasses.replace(config.sampling, shift=shift, resolution=trained_resolution(config, base, manifest))


def default_weights(config: FinetuneConfig) -> str:
    """The weights that are exported by default."""
    return "ema" if config.train.ema.decay else "trained"


def trained_resolution(config: FinetuneConfig, base: BaseModel, manifest: Manifest) -> int | None:
    """Height and width in pixels of the model's images, from those it was trained on; None: the base's own size."""
    edge = config.sampling.resolution or manifest.fingerprint.get("resolution")
    return None if edge is None or base.default_size == (edge, edge) else int(edge)
