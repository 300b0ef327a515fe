"""The UNets of SD 1.5, SD 2.1 and SDXL as diffusers describes them, and networks of the same shape with tiny widths."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from d2f_core.model.architectures import KNOWN

FULL: dict[str, dict[str, Any]] = {name: dict(known.unet) for name, known in KNOWN.items()}

TINY: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (8, 16, 32, 32), "attention_head_dim": 2, "cross_attention_dim": 12},
    "sd21": {"block_out_channels": (8, 16, 32, 32), "attention_head_dim": (1, 2, 4, 4), "cross_attention_dim": 16},
    "sdxl": {
        "block_out_channels": (8, 16, 32),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 20,
        "transformer_layers_per_block": (1, 1, 2),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
}
NAMES = tuple(FULL)


def full_unet(name: str) -> UNet2DConditionModel:
    """The full architecture on the meta device: shapes without memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(**FULL[name])


def tiny_unet(name: str, seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """The same kinds of blocks, levels and conditions, with widths / 40, half as deep, and random weights.

    Args:
        changes: other fields of the config.
    """
    torch.manual_seed(seed)
    small = {"sample_size": 8, "norm_num_groups": 4, "layers_per_block": 1}
    return UNet2DConditionModel(**FULL[name] | TINY[name] | small | changes).eval()


def tiny_condition(name: str, batch: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    """What the tiny network of this name needs, by the denoiser's argument names."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, 5, TINY[name]["cross_attention_dim"], generator=generator)
    if name != "sdxl":
        return {"text_states": states}
    sizes = torch.tensor([1024.0, 768.0, 0.0, 16.0, 1023.0, 1023.0]).repeat(batch, 1)
    return {"text_states": states, "pooled_text": torch.randn(batch, 24, generator=generator), "time_ids": sizes}


def tiny_inputs(batch: int = 2, side: int = 8, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """A diffusion state [batch, 4, side, side] and fractional timesteps [batch]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, side, side, generator=generator), torch.linspace(10.5, 700.25, batch)
