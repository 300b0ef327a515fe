"""SD 1.5 and SD 2.1 with every part in diffusers' layout, small enough to train in milliseconds; weights are random."""

from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from transformers import CLIPTextModel

from tests.model.architectures import TINY, tiny_unet
from tests.model.tiny_sdxl import END, _text_config, _write_tokenizer, write_tiny_sdxl

Name = Literal["sd15", "sd21", "sdxl"]


def write_tiny(path: Path, name: Name) -> Path:
    """64 px images, latents 4x8x8."""
    if name == "sdxl":
        return write_tiny_sdxl(path)
    tiny_unet(name).save_pretrained(path / "unet")
    torch.manual_seed(1)
    width, activation = TINY[name]["cross_attention_dim"], "quick_gelu" if name == "sd15" else "gelu"
    CLIPTextModel(_text_config(width, activation)).save_pretrained(path / "text_encoder")
    _write_tokenizer(path / "tokenizer", END if name == "sd15" else "!")
    AutoencoderKL(
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.18215,
    ).save_pretrained(path / "vae")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="epsilon" if name == "sd15" else "v_prediction",
    ).save_pretrained(path / "scheduler")  # fmt: skip
    return path
