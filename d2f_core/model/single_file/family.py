"""The three kinds of Stable Diffusion that the original single file is known for, and the table of each one's tensors.

Which family a directory or a file belongs to is told by its text encoders: OpenAI's CLIP (SD 1.5), OpenCLIP (SD 2.1),
or both (SDXL). Sizes come from the configs, so that the table holds for networks of other widths and depths too.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from d2f_core.model.single_file.keys import (
    AUTOENCODER,
    UNET,
    Entry,
    LayoutError,
    clip_entries,
    openclip_entries,
    unet_entries,
    vae_entries,
)

TEXT_MODEL = "text_model."
"""Before the names of a text encoder's tensors as published; transformers 5.23 saves them without it."""
DIFFUSERS_FILE, TRANSFORMERS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Encoder:
    part: str
    """Its directory in diffusers' layout."""
    prefix: str
    """Before its keys in the file."""
    openclip: bool
    projects: bool = False
    """Whether it also puts out the pooled text, through a projection."""


@dataclass(frozen=True, kw_only=True)
class Family:
    name: str
    """As in `d2f_core.model.architectures.KNOWN`, and of the directory with its configs."""
    title: str
    encoders: tuple[Encoder, ...]
    scaling_factor: float
    """Of the latents; programs that read a single file take it from the family."""
    prediction_type: str
    """Of the published model: what a file that says nothing is taken for."""


def _encoder(part: str, prefix: str, **more: bool) -> Encoder:
    return Encoder(part=part, prefix=prefix, openclip=prefix.endswith(".model."), **more)


SD15 = Family(
    name="sd15", title="SD 1.5", encoders=(_encoder("text_encoder", "cond_stage_model.transformer."),),
    scaling_factor=0.18215, prediction_type="epsilon",
)  # fmt: skip
SD21 = Family(
    name="sd21", title="SD 2.1", encoders=(_encoder("text_encoder", "cond_stage_model.model."),),
    scaling_factor=0.18215, prediction_type="v_prediction",
)  # fmt: skip
SDXL = Family(
    name="sdxl",
    title="SDXL",
    encoders=(
        _encoder("text_encoder", "conditioner.embedders.0.transformer."),
        _encoder("text_encoder_2", "conditioner.embedders.1.model.", projects=True),
    ),
    scaling_factor=0.13025,
    prediction_type="epsilon",
)
FAMILIES = (SDXL, SD21, SD15)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A network: its directory in diffusers' layout, and its tensors in both layouts."""

    directory: str
    file: str
    """Name of its weights in the directory."""
    entries: tuple[Entry, ...]
    shapes: Mapping[str, torch.Size]
    """By the names in `entries`."""
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors by key that the published files hold, and that no network is trained in."""

    def saved(self, name: str) -> str:
        """A tensor's name in the directory's weights, as published."""
        is_inside = self.file == TRANSFORMERS_FILE and name != "text_projection.weight"
        return TEXT_MODEL + name if is_inside else name

    def key_shape(self, entry: Entry) -> torch.Size:
        """Shape of an entry's tensor in the file."""
        return entry.join([torch.empty(self.shapes[name], device="meta") for name in entry.names]).shape


def family_of_directory(directory: Path) -> Family:
    """The family of a model in diffusers' layout.

    Raises:
        LayoutError: it has text encoders of another kind, or none.
    """
    if (reference := directory / "text_encoder/reference.json").is_file():
        package = json.loads(reference.read_text()).get("package")
        raise LayoutError(
            f"the text encoder is that of the Python package {package!r}, and the original layout holds CLIP's alone. "
            "Export in diffusers' layout."
        )
    if (directory / "text_encoder_2").is_dir():
        return SDXL
    activation = read_config(directory, "text_encoder").get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise LayoutError(
            f"the text encoder has hidden_act={activation!r}; the original layout holds OpenAI's CLIP (quick_gelu) and "
            "OpenCLIP (gelu). Export in diffusers' layout."
        )
    return SD15 if activation == "quick_gelu" else SD21


def family_of_keys(keys: Collection[str]) -> Family:
    """The family of a single file.

    Raises:
        LayoutError: the file is no whole checkpoint of one of the families; says what it looks like instead.
    """
    begins = lambda *prefixes: any(key.startswith(prefixes) for key in keys)  # noqa: E731
    if begins("lora_", "lycoris_") or any(".lora_" in key for key in keys):
        raise LayoutError("is a LoRA, which changes a base model and is none. Give the checkpoint it was made for.")
    if begins(f"{UNET}double_blocks.", f"{UNET}joint_blocks.", "double_blocks.", "joint_blocks."):
        raise LayoutError(f"holds a transformer, not a UNet. Give a checkpoint of {_titles()}.")
    if begins("model_ema.") and not begins(UNET):
        raise LayoutError(
            "holds the averaged weights alone (model_ema.), whose names have lost their dots. Give the file whose "
            f"UNet is under {UNET}, as programs write it."
        )
    for family in FAMILIES:
        if all(begins(encoder.prefix) for encoder in family.encoders):
            return family
    if begins("conditioner.embedders.0.model."):
        raise LayoutError(f"has SDXL's second text encoder alone, as its refiner. Give a checkpoint of {_titles()}.")
    parts = {"UNet": UNET, "autoencoder": AUTOENCODER}
    if found := [name for name, prefix in parts.items() if begins(prefix)]:
        raise LayoutError(f"holds {' and '.join(found)} without a text encoder. Give the whole checkpoint.")
    raise LayoutError(f"holds nothing under {UNET}: it is no checkpoint in the original layout of {_titles()}.")


def _titles() -> str:
    return ", ".join(family.title for family in reversed(FAMILIES))


def read_parts(configs: Path, family: Family) -> list[Part]:
    """The networks of a model, by the configs in a directory; takes no memory for their weights.

    Raises:
        LayoutError: a config is missing, or describes a network that the layout has no names for.
    """
    unet, vae = read_config(configs, "unet"), read_config(configs, "vae")
    with torch.device("meta"):
        networks = cast(Any, UNet2DConditionModel).from_config(unet), cast(Any, AutoencoderKL).from_config(vae)
    shapes = [_shapes(network) for network in networks]
    return [
        Part(
            directory="unet",
            file=DIFFUSERS_FILE,
            entries=tuple(unet_entries(shapes[0], networks[0].config)),
            shapes=shapes[0],
        ),
        *(_encoder_part(configs, encoder) for encoder in family.encoders),
        Part(
            directory="vae",
            file=DIFFUSERS_FILE,
            entries=tuple(vae_entries(shapes[1], networks[1].config)),
            shapes=shapes[1],
        ),
    ]


def _encoder_part(configs: Path, encoder: Encoder) -> Part:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**read_config(configs, encoder.part))
    with torch.device("meta"):
        network = (CLIPTextModelWithProjection if encoder.projects else CLIPTextModel)(config)
    shapes = {name.removeprefix(TEXT_MODEL): shape for name, shape in _shapes(network).items()}
    places = torch.arange(config.max_position_embeddings)[None]
    return Part(
        directory=encoder.part,
        file=TRANSFORMERS_FILE,
        entries=tuple((openclip_entries if encoder.openclip else clip_entries)(shapes, encoder.prefix)),
        shapes=shapes,
        buffers={} if encoder.openclip else {f"{encoder.prefix}{TEXT_MODEL}embeddings.position_ids": places},
    )


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def read_config(directory: Path, part: str) -> dict[str, Any]:
    """The config of a network in diffusers' layout; raises LayoutError when there is none."""
    try:
        return json.loads((directory / part / "config.json").read_text())
    except FileNotFoundError:
        raise LayoutError(f"there is no {part}/config.json. Copy that directory of the original model.") from None
