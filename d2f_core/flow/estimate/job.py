"""Estimates what a finetuning needs before it is started: memory by ZeRO stage, hours and storage. Needs no weights or
cluster.

Bytes and operations are counted on the architecture; the share of a GPU's peak that is reached is an assumption.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from torch import nn

from d2f_core.data.schema import array_field, is_array
from d2f_core.flow.estimate.config import EstimateConfig
from d2f_core.flow.latents import depth_latent_schema, latent_schema
from d2f_core.model import footprint
from d2f_core.model.architectures import Architecture, read_architecture
from d2f_core.model.caption_cache import CACHED_BYTES
from d2f_core.model.config import ModelConfig
from d2f_core.model.denoiser import extend_input_channels
from d2f_core.model.lora import add_lora
from d2f_core.train.config import TrainConfig
from d2f_core.train.memory import RUNTIME_BYTES, host_bytes, memory_per_worker
from d2f_core.train.memory_table import ByStage, memory_by_stage, memory_table
from d2f_core.train.precision import DTYPES

TEXT_BYTES = 400
"""Assumed bytes of one row's caption, names and numbers."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    total: int
    """Parameters of the network."""
    trained: int
    memory: ByStage
    train_hours: float
    encode_hours: float
    """Hours in which all workers together encode the images."""
    row_bytes: int
    table_bytes: int
    checkpoint_bytes: int
    """Bytes of one checkpoint."""
    flops_per_sample: float
    """Floating point operations per sample, forward and backward."""


def build_on_meta(architecture: Architecture, model: ModelConfig) -> nn.Module:
    """The module to train on torch's meta device, which allocates no memory."""
    with torch.device("meta"):
        unet = architecture.build_unet()
        if model.joins_latents:
            extend_input_channels(unet, unet.config["out_channels"])
        return add_lora(unet, model.lora) if model.method == "lora" else unet.requires_grad_(True)


def estimate(config: EstimateConfig) -> Estimate:
    """Count memory and operations of the passes, and derive the rest from them.

    Raises:
        ValueError: the resolution does not fit the autoencoder, or the architecture is unknown.
    """
    architecture, train = read_architecture(config.architecture), config.train
    side, rest = divmod(config.resolution, architecture.pixels_per_latent)
    if side < 1 or rest:
        raise ValueError(
            f"resolution={config.resolution} must be a multiple of the autoencoder's "
            f"{architecture.pixels_per_latent} pixels."
        )
    network, chunks = build_on_meta(architecture, config.model), config.model.captions.chunks
    counted = footprint.count_pass(
        network, batch=train.micro_batch_size, side=side, dtype=DTYPES[train.precision],
        checkpointing=train.activation_checkpointing, chunks=chunks,
    )  # fmt: skip
    with torch.device("meta"):
        encoders, vae = architecture.build_text_encoders(), architecture.build_vae()
    trained, frozen = footprint.sizes(network, trained=True), footprint.sizes(network, trained=False)
    others = RUNTIME_BYTES * train.use_gpu + _text_bytes(architecture, encoders, config)
    drawn = max(counted.peak_bytes, footprint.decode_bytes(vae, side))
    samples, rate = train.num_steps * train.global_batch_size, config.flops_per_hour(train.num_workers)
    per_sample = counted.flops / train.micro_batch_size
    row_bytes = _row_bytes(config, (int(vae.config["latent_channels"]), side, side))
    return Estimate(
        total=sum(trained) + sum(frozen),
        trained=sum(trained),
        memory=memory_by_stage(
            train,
            trained,
            frozen,
            activations=counted.peak_bytes,
            others=others,
            evaluation=_evaluation_bytes(train, vae, drawn),
        ),
        train_hours=samples * (per_sample + chunks * footprint.text_flops(encoders)) / rate,
        encode_hours=config.rows * footprint.encode_flops(vae, config.resolution) / rate,
        row_bytes=row_bytes,
        table_bytes=config.rows * row_bytes,
        checkpoint_bytes=sum(trained) * (16 if train.ema.decay else 12),
        flops_per_sample=per_sample,
    )


def worker_bytes(base: Path, model: ModelConfig, train: TrainConfig) -> int:
    """Bytes of the host's memory that a worker takes, without activations: those need a pass to be counted.

    Args:
        base: directory of the base model.
    """
    unet = json.loads((base / "unet/config.json").read_text())
    network = build_on_meta(Architecture(unet=unet, text_encoders=(), vae={}), model)
    trained, frozen = footprint.sizes(network, trained=True), footprint.sizes(network, trained=False)
    memory = memory_per_worker(train, trained, frozen)
    text = sum(file.stat().st_size for file in base.glob("text_encoder*/*.safetensors"))
    return host_bytes(memory, use_gpu=train.use_gpu) + text


def _evaluation_bytes(train: TrainConfig, vae: nn.Module, passes: int) -> int:
    """Bytes of an evaluation between steps: the autoencoder in fp32, and its passes.

    A guided pass holds no more than one that trains, which keeps what the backward pass needs.
    """
    if not train.evaluate_every or train.evaluation_place != "workers":
        return 0
    return passes + 4 * sum(parameter.numel() for parameter in vae.parameters())


def _text_bytes(architecture: Architecture, encoders: Iterable[nn.Module], config: EstimateConfig) -> int:
    """Bytes of the text encoders in fp32, and of the encoded captions that a worker caches."""
    weights = 4 * sum(parameter.numel() for one in encoders for parameter in one.parameters())
    pooled = sum(int(each.get("projection_dim") or 0) for each in architecture.text_encoders[1:])
    tokens = config.model.captions.chunks * footprint.TOKENS
    each = 4 * (tokens * int(architecture.unet["cross_attention_dim"]) + pooled)
    captions = 1 if config.model.joins_latents else (config.captions or config.rows) + 1
    return weights + min(CACHED_BYTES, captions * each)


def _row_bytes(config: EstimateConfig, latent: tuple[int, int, int]) -> int:
    fields: list[pa.Field] = list((depth_latent_schema if config.model.joins_latents else latent_schema)(latent))
    if config.pairs:
        fields.append(array_field("noise", "float16", latent))
    return TEXT_BYTES + sum(one.type.byte_width for one in fields if is_array(one))


def report(config: EstimateConfig, found: Estimate) -> str:
    """The estimate as Markdown; 1 GB is 1e9 bytes."""
    train = config.train
    on = "on" if train.activation_checkpointing else "off"
    title = (
        f"{config.architecture}: {found.trained / 1e6:.1f} M of {found.total / 1e6:.1f} M parameters are trained; "
        f"{train.precision}, {config.resolution} px, micro-batch {train.micro_batch_size}, {train.num_workers} "
        f"workers, offload {train.offload}, activation checkpointing {on}"
    )
    table = memory_table(found.memory, chosen=train.zero_stage, gpu=config.gpu)
    return "\n".join([title, "", *table, "", *_times(config, found)])


def _times(config: EstimateConfig, found: Estimate) -> list[str]:
    train = config.train
    kept = train.keep_checkpoints + train.keep_best
    return [
        config.assumption(),
        f"- {found.flops_per_sample / 1e12:.2f} TFLOP per sample; {train.num_steps} steps of "
        f"{train.global_batch_size}: {config.span(found.train_hours)} h. Encoding {config.rows} images before: "
        f"{config.span(found.encode_hours)} h.",
        f"- {config.cost(found.train_hours * train.num_workers, train.num_steps * train.global_batch_size)}",
        f"- storage: {found.row_bytes / 1e3:.1f} kB a row, {found.table_bytes / 1e9:.1f} GB the latent table; "
        f"{found.checkpoint_bytes / 1e9:.2f} GB a checkpoint, {kept} kept.",
    ]
