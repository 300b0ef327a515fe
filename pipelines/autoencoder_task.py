"""The task of training an autoencoder on pictures, and the export of its weights."""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from d2f_core import storage
from d2f_core.data.depth import BadDepthError, normalise_depth
from d2f_core.data.depth_files import decode_depth
from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.data.table_reader import RowReader
from d2f_core.model.artifact import load_weights
from d2f_core.model.autoencoder import autoencoder_fingerprint, check_autoencoder, load_autoencoder
from d2f_core.model.autoencoder_training import (
    AutoencoderTask,
    TrainableAutoencoder,
    decode_pixels,
    latent_scaling,
    new_autoencoder,
)
from d2f_core.model.base import BaseModel, BaseModelError, local_copy, resolve_base
from d2f_core.model.latent_task import image_grid
from d2f_core.train.checkpoint import Checkpoint, read_tensors
from d2f_core.train.task import Evaluation, Task
from pipelines.configs import TrainAutoencoderConfig

SHOWN = 12


def columns(manifest: Manifest) -> tuple[str, ...]:
    return ("image", "depth") if manifest.kind == "depth" else ("image",)


def pictures(table: pa.Table) -> np.ndarray:
    """Float32 [rows, 1 or 2, 3, H, W] in [-1, 1]: a row's image, and its depth if it has one."""
    images = decode_pixels(table.column("image").to_pylist())
    if "depth" not in table.column_names:
        return images[:, None]
    depths = [_depth_picture(data, image) for data, image in zip(table["depth"].to_pylist(), images, strict=True)]
    return np.stack([images, np.stack(depths)], axis=1)


def _depth_picture(data: bytes, image: np.ndarray) -> np.ndarray:
    """The picture that a depth model's decoder produces: normalised depth in three equal channels."""
    depth = decode_depth(data)
    try:
        normalised, _, _ = normalise_depth(depth, np.isfinite(depth))
    except BadDepthError:  # no depth, or constant depth: use the image twice
        return image
    return np.broadcast_to(normalised, image.shape)


def initial(config: TrainAutoencoderConfig) -> TrainableAutoencoder:
    """The network at the start of the training."""
    if config.base:
        network = load_autoencoder(resolve_base(config.base)).network.requires_grad_(True)
        return TrainableAutoencoder(network, decoder_only=True)
    return TrainableAutoencoder(new_autoencoder(vae_config(config), config.train.seed))


def vae_config(config: TrainAutoencoderConfig) -> dict[str, Any]:
    return json.loads((local_copy(config.vae_config) / "config.json").read_text())


def begins_with(config: TrainAutoencoderConfig, find_base: Callable[[str], BaseModel] = resolve_base) -> dict[str, Any]:
    """What identifies the network at the start of the training."""
    if config.base:
        base = find_base(config.base)
        check_autoencoder(base)
        return {"decoder_of": autoencoder_fingerprint(base)}
    return {"vae": vae_config(config)}


def build_task(config: TrainAutoencoderConfig, begun_with: Mapping[str, Any], device: str) -> Task:
    """What a worker trains; called once on each.

    Args:
        begun_with: `begins_with` where the training started.

    Raises:
        BaseModelError: this node has another base model, or another config of a new autoencoder.
    """
    if (here := begins_with(config)) != begun_with:
        raise BaseModelError(
            f"{config.base or config.vae_config!r} is {here} on this node, and {dict(begun_with)} where the training "
            "started. Give a URI that all nodes share."
        )
    task = AutoencoderTask(initial(config).to(device), config.loss, seed=config.train.seed, device=device)
    return Task(
        module=task.module,
        to_batch=lambda table: task.to_batch(pictures(table), table["epoch"].to_pylist(), table["row"].to_pylist()),
        loss_fn=task.loss,
        evaluate=functools.partial(evaluate, config, task),
        make_grid=functools.partial(image_grid, columns=SHOWN),
    )


def evaluate(config: TrainAutoencoderConfig, task: AutoencoderTask) -> Evaluation:
    """The reconstruction error on the held-out rows' pictures, and some of the pictures beside their
    reconstructions.
    """
    manifest = read_manifest(config.images)
    wanted = columns(manifest)
    held = config.plan(manifest, wanted).sources[0].order.holdout()
    if not len(held):
        return Evaluation()
    reader, at_once = RowReader(config.images, manifest, wanted), config.train.micro_batch_size
    errors, pairs = [], []
    for start in range(0, len(held), at_once):  # what training has room for
        error, shown = task.reconstruct(task.module, pictures(reader.read(held[start : start + at_once])))
        errors.append(error)
        pairs += shown[: SHOWN - len(pairs)]
    mean = torch.cat(errors).mean(0)
    metrics = {"validation_absolute_error": float(mean[0])}
    if "depth" in wanted:
        metrics["validation_absolute_error_depth"] = float(mean[1])
    return Evaluation(metrics=metrics, images=pairs)


def export(config: TrainAutoencoderConfig, last: Checkpoint) -> str:
    """Write `OUTPUT/vae/`, or `OUTPUT/base/`, from the averaged weights of a checkpoint."""
    module = initial(config)
    load_weights(module, read_tensors(last, "ema" if config.train.ema.decay else "weights"))
    network = module.autoencoder.eval()
    with tempfile.TemporaryDirectory() as directory:
        place, name = Path(directory), "base" if config.base else "vae"
        if config.base:
            # Not in half precision, because the encoder must stay the same bit for bit.
            shutil.copytree(resolve_base(config.base).path, place / name)
            shutil.rmtree(place / name / "vae")
            network.save_pretrained(place / name / "vae", safe_serialization=True)
        else:
            network.register_to_config(scaling_factor=round(latent_scaling(network, _sample(config)), 5))
            network.half().save_pretrained(place / name, safe_serialization=True)
        target = storage.join(config.output, name)
        storage.upload_tree(place / name, target)
    return target


def _sample(config: TrainAutoencoderConfig) -> torch.Tensor:
    """Pictures of the first rows of the training, [pictures, 3, H, W]."""
    manifest = read_manifest(config.images)
    wanted = columns(manifest)
    order = config.plan(manifest, wanted).sources[0].order
    rows = order.at(np.arange(min(256, order.num_samples)))[1]
    return torch.from_numpy(pictures(RowReader(config.images, manifest, wanted).read(rows))).flatten(0, 1)
