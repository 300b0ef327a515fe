"""The networks of SD 1.5, SD 2.1 and SDXL as their configs describe them, built without weights or downloads.

| name | UNet      | text encoders             | autoencoder | prediction | trained at |
|------|-----------|---------------------------|-------------|------------|------------|
| sd15 | 859.5 M   | CLIP ViT-L/14, 123.1 M    | 83.7 M      | epsilon    | 512 px     |
| sd21 | 865.9 M   | OpenCLIP ViT-H/14, 340.4 M| 83.7 M      | v          | 768 px     |
| sdxl | 2,567.5 M | the first one, and OpenCLIP ViT-bigG/14, 694.7 M | 83.7 M | epsilon | 1024 px |
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from d2f_core import storage
from d2f_core.model.base import BaseModelError, is_sdxl

Config = Mapping[str, Any]
DOWN, UP = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3

_SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": (*DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *UP),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
_SD21_UNET: dict[str, Any] = _SD15_UNET | {
    "sample_size": 96,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", *DOWN[:2]),
    "up_block_types": (*UP[:2], "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def _clip(width: int, layers: int, heads: int, activation: str, projection: int) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "hidden_act": activation,
        "projection_dim": projection,
    }


_CLIP_L, _CLIP_H = _clip(768, 12, 12, "quick_gelu", 768), _clip(1024, 23, 16, "gelu", 512)
_CLIP_G = _clip(1280, 32, 20, "gelu", 1280)
_VAE: dict[str, Any] = {
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The configs of a base model's networks. Networks built under `torch.device("meta")` take no memory."""

    unet: Config
    text_encoders: tuple[Config, ...]
    vae: Config

    @property
    def pixels_per_latent(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    def build_unet(self) -> UNet2DConditionModel:
        return cast(Any, UNet2DConditionModel).from_config(dict(self.unet))

    def build_vae(self) -> AutoencoderKL:
        return cast(Any, AutoencoderKL).from_config(dict(self.vae))

    def build_text_encoders(self) -> list[nn.Module]:
        """The CLIP text encoder; SDXL has two, the second with a projection."""
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        kinds: tuple[Any, Any] = CLIPTextModel, CLIPTextModelWithProjection
        configs = (CLIPTextConfig(**config) for config in self.text_encoders)
        return [kind(config) for kind, config in zip(kinds, configs, strict=False)]


KNOWN = {
    "sd15": Architecture(unet=_SD15_UNET, text_encoders=(_CLIP_L,), vae=_VAE),
    "sd21": Architecture(unet=_SD21_UNET, text_encoders=(_CLIP_H,), vae=_VAE),
    "sdxl": Architecture(
        unet=_SDXL_UNET, text_encoders=(_CLIP_L, _CLIP_G), vae=_VAE | {"sample_size": 1024, "scaling_factor": 0.13025}
    ),
}


def read_architecture(name: str) -> Architecture:
    """An architecture by its name in `KNOWN`, or from the configs in a base model's directory (local or s3://).

    Raises:
        BaseModelError: the name is unknown, or a config is missing.
    """
    if name in KNOWN:
        return KNOWN[name]
    unet = _read(name, "unet")
    encoders = ("text_encoder", "text_encoder_2") if is_sdxl(unet) else ("text_encoder",)
    return Architecture(unet=unet, text_encoders=tuple(_read(name, part) for part in encoders), vae=_read(name, "vae"))


def _read(base: str, part: str) -> dict[str, Any]:
    try:
        return json.loads(storage.read_bytes(storage.join(base, f"{part}/config.json")))
    except FileNotFoundError:
        raise BaseModelError(
            f"architecture={base!r} has no {part}/config.json. Use {', '.join(KNOWN)}, or a base model's directory "
            "(local or s3://) whose networks all have a config."
        ) from None
