"""SD 1.5 and SD 2.1 with every part in diffusers' layout, small enough to train in milliseconds; weights are random."""

from pathlib import Path
from typing import Literal

import torch
from diffusers import DDIMScheduler
from transformers import CLIPTextModel

from d2f_core.model.published_names import with_published_names
from tests.model.architectures import TINY, tiny_unet
from tests.model.tiny_sdxl import END, text_config, write_tiny_sdxl, write_tokenizer, write_vae

Name = Literal["sd15", "sd21", "sdxl"]


def write_tiny(path: Path, name: Name) -> Path:
    """64 px images, latents 4x8x8."""
    if name == "sdxl":
        return write_tiny_sdxl(path)
    tiny_unet(name).save_pretrained(path / "unet")
    torch.manual_seed(1)
    width, activation = TINY[name]["cross_attention_dim"], "quick_gelu" if name == "sd15" else "gelu"
    CLIPTextModel(text_config(width, activation)).save_pretrained(path / "text_encoder")
    with_published_names(path / "text_encoder")
    write_tokenizer(path / "tokenizer", END if name == "sd15" else "!")
    write_vae(path / "vae", scaling_factor=0.18215)
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="epsilon" if name == "sd15" else "v_prediction",
    ).save_pretrained(path / "scheduler")  # fmt: skip
    return path
