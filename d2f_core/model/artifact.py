"""A trained model as files: weights, where its base is, and how to sample it.

    diff2flow.json            the description below
    unet/                     full finetuning: a diffusers UNet
    adapter/                  LoRA: PEFT's adapter_config.json and adapter_model.safetensors

Safetensors and JSON only: nothing in it can run code.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from d2f_core import storage
from d2f_core.content import hash_directory
from d2f_core.model.base import BaseModel, local_copy, resolve_base
from d2f_core.model.denoiser import as_denoiser, load_unet, network_dtype
from d2f_core.model.lora import load_lora
from d2f_core.objective.alignment import Denoiser, NaiveVelocityField, VelocityField
from d2f_core.objective.schedule import NoiseSchedule

DESCRIPTION = "diff2flow.json"
FORMAT_VERSION = 1


class ArtifactError(ValueError):
    """A model directory that cannot be used, with the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """How a model is to be sampled; it travels with the weights."""

    solver: str = "euler"
    """euler, midpoint, heun or rk4 in flow time; ddim for a diffusion model."""
    steps: int = 10
    """Steps from noise to data."""
    guidance: float = 3.0
    """Classifier-free guidance scale; 1 is none."""
    shift: float = 1.0
    """Above 1, steps are spent nearer to noise, as large images need; not used by ddim."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model that is ready to sample: a base as it is, or finetuned."""

    base: BaseModel
    network: nn.Module
    objective: str
    """diff2flow, flow_matching or diffusion: what the weights were last trained with."""
    sampling: SamplingDefaults
    content_hash: str

    @property
    def schedule(self) -> NoiseSchedule:
        return self.base.schedule

    @property
    def prediction_type(self) -> str:
        return self.base.prediction_type

    @property
    def denoiser(self) -> Denoiser:
        return as_denoiser(self.network, network_dtype(self.network))

    @property
    def velocity_field(self) -> VelocityField | NaiveVelocityField:
        """(x_t, t, **condition) -> velocity; the condition by the denoiser's argument names, `text_states` at least."""
        if self.objective == "flow_matching":
            return NaiveVelocityField(self.denoiser, self.schedule)
        return VelocityField(self.denoiser, self.schedule, self.prediction_type)

    def to(self, device: str | torch.device) -> "TrainedModel":
        self.network.to(device)
        return self


def describe(
    base: BaseModel, *, objective: str, method: str, sampling: SamplingDefaults, training: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of `diff2flow.json`."""
    return {
        "format_version": FORMAT_VERSION,
        "objective": objective,
        "method": method,
        "base": {"uri": base.uri, "sha256": base.content_hash},
        "prediction_type": base.prediction_type,
        "schedule": dict(base.scheduler_config),
        "time_convention": "t=0 noise, t=1 data",
        "sampling": asdict(sampling),
        "training": dict(training),
    }


def save_artifact(directory: Path, network: nn.Module, description: Mapping[str, Any]) -> None:
    """Write a trained network (a UNet, or PEFT's wrapper around one) with its description."""
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / ("adapter" if description["method"] == "lora" else "unet")
    cast(Any, network).save_pretrained(part, safe_serialization=True)
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def upload_artifact(target: str, network: nn.Module, description: Mapping[str, Any]) -> None:
    """Write a trained network to a URI, in place of what may lie there; its description comes last."""
    storage.remove_tree(storage.join(target, DESCRIPTION))  # without it a half-replaced model is none
    with tempfile.TemporaryDirectory() as directory:
        save_artifact(Path(directory), network, description)
        storage.upload_tree(Path(directory), target, last=DESCRIPTION)


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put trained weights, by parameter name, into a network made as for the training.

    Raises:
        ArtifactError: the network has no such parameter, or a trained one is missing.
    """
    unknown = network.load_state_dict(dict(weights), strict=False).unexpected_keys
    missing = [name for name, p in network.named_parameters() if p.requires_grad and name not in weights]
    if unknown or missing:
        raise ArtifactError(
            f"the weights do not fit the network: unknown {unknown[:3]}, missing {missing[:3]}. "
            "Use the model config that they were trained with."
        )


def read_description(directory: Path) -> dict[str, Any]:
    """Read and check `diff2flow.json`."""
    description = json.loads((directory / DESCRIPTION).read_text())
    if description.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{directory} has format_version={description.get('format_version')!r}; this release reads "
            f"{FORMAT_VERSION}. Use the release that wrote it, or train again."
        )
    return description


def load_model(uri: str, *, base_uri: str | None = None) -> TrainedModel:
    """Load a base model (sampled by DDIM) or a trained artifact, by local directory or s3:// prefix.

    Args:
        base_uri: where the base lies here, when it moved; its hash must still be the one that was trained on.

    Raises:
        ArtifactError: the base is not the one that the artifact was trained on, or the format is unknown.
        BaseModelError: neither an artifact nor a base model lies there.
    """
    directory = local_copy(uri)
    if not (directory / DESCRIPTION).is_file():
        base = resolve_base(uri)
        return TrainedModel(
            base=base,
            network=load_unet(base).eval().requires_grad_(False),
            objective="diffusion",
            sampling=SamplingDefaults(solver="ddim", steps=25),
            content_hash=base.content_hash,
        )
    description = read_description(directory)
    base = resolve_base(base_uri or description["base"]["uri"])
    if base.content_hash != description["base"]["sha256"]:
        raise ArtifactError(
            f"{uri!r} was trained on a base with sha256 {description['base']['sha256']}, but {base.uri!r} has "
            f"{base.content_hash}. Give the original base."
        )
    if description["method"] == "lora":
        network = load_lora(load_unet(base), directory / "adapter")
    else:
        network = cast(nn.Module, UNet2DConditionModel.from_pretrained(directory / "unet", use_safetensors=True))
    return TrainedModel(
        base=base,
        network=network.eval().requires_grad_(False),
        objective=description["objective"],
        sampling=SamplingDefaults(**description["sampling"]),
        content_hash=hash_directory(directory),
    )


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels [batch, 3, H, W] in [-1, 1] as uint8 [batch, H, W, 3]."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
