"""A diffusers UNet as the one callable that the objective knows: `(x_dm, timestep, text_states=...) -> prediction`."""

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from d2f_core.model.base import BaseModel, BaseModelError
from d2f_core.objective.alignment import Denoiser


def load_unet(base: BaseModel, *, from_scratch: bool = False, seed: int = 0) -> UNet2DConditionModel:
    """The base model's UNet in float32; `from_scratch` keeps its config and draws new weights from `seed`."""
    directory = base.path / "unet"
    if from_scratch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cast(Any, UNet2DConditionModel).from_config(UNet2DConditionModel.load_config(directory))
    if not any(directory.glob("*.safetensors")):
        raise BaseModelError(
            f"{base.uri!r} has no safetensors in unet/. Convert the weights with "
            "save_pretrained(safe_serialization=True), or train from random weights with --from-scratch."
        )
    return UNet2DConditionModel.from_pretrained(directory, torch_dtype=torch.float32, use_safetensors=True)


def as_denoiser(network: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Denoiser:
    """Adapt a UNet, or the engine around it, that computes in `dtype`."""

    def denoise(x_dm: Tensor, timestep: Tensor, *, text_states: Tensor) -> Tensor:
        return network(x_dm.to(dtype), timestep, encoder_hidden_states=text_states.to(dtype)).sample

    return denoise


def network_dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype
