"""What diffusers and ComfyUI make of single-file LoRAs on a base."""

from pathlib import Path
from typing import cast

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from d2f_core.model.base import resolve_base
from d2f_core.model.denoiser import load_unet


def loaded_by_diffusers(base: Path, *files: Path) -> UNet2DConditionModel:
    """The UNet of a stock pipeline that loaded each file as an adapter, all of them active."""
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=load_unet(resolve_base(str(base))),
        scheduler=EulerDiscreteScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for file in files:
        pipeline.load_lora_weights(str(file), adapter_name=file.stem)
    pipeline.set_adapters([file.stem for file in files])
    return pipeline.unet


@torch.no_grad()
def loaded_by_comfy(base: Path, *files: Path) -> tuple[UNet2DConditionModel, set[str]]:
    """The UNet with what ComfyUI adds for each file, and the keys of which it says that they were not loaded.

    It knows a diffusers layer as `lora_unet_` with underscores, and as `unet.` with dots, where attention projections
    have `.processor` in their names. Of each it reads down, up and alpha, or A and B, and the change of a bias.
    """
    unet, unknown = load_unet(resolve_base(str(base))), set[str]()
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    for file in files:
        tensors = load_file(file)
        for name, layer in layers.items():
            for key in (f"lora_unet_{name.replace('.', '_')}", f"unet.{name.replace('.to_', '.processor.to_')}"):
                alpha, bias = tensors.pop(f"{key}.alpha", None), tensors.pop(f"{key}.diff_b", None)
                for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
                    if (second := tensors.pop(f"{key}.{up}.weight", None)) is not None:
                        first = tensors.pop(f"{key}.{down}.weight")
                        scale = 1.0 if alpha is None else alpha / len(first)
                        layer.weight += scale * (second.flatten(1) @ first.flatten(1)).reshape(layer.weight.shape)
                if bias is not None:
                    cast(Tensor, layer.bias).add_(bias)
        unknown |= tensors.keys()
    return unet, unknown
