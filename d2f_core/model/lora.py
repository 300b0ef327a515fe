"""LoRA adapters on a UNet's linear and convolutional layers, through PEFT."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn

ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
RESNET = r".*\.(conv1|conv2|conv_shortcut|time_emb_proj)"
FEED_FORWARD = r".*\.(proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)"
ENDS = r".*samplers\.0\.conv|conv_in|conv_out"
TARGETS = {"attention": ATTENTION, "all": "|".join(f"({part})" for part in (ATTENTION, RESNET, FEED_FORWARD, ENDS))}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 16
    """Inner width of each adapter."""
    alpha: float | None = None
    """Scale: the adapter adds `alpha / rank * B A`; default: the rank, so a scale of 1."""
    targets: Literal["attention", "all"] = "all"
    """`attention`: q, k, v and output projections. `all`: also convolutions and feed-forward layers."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora rank={self.rank} must be at least 1. Use 4 to 128.")


def add_lora(unet: UNet2DConditionModel, config: LoraConfig, *, seed: int = 0) -> PeftModel:
    """Freeze the UNet and add adapters that change nothing yet (B starts at zero); A is drawn from `seed`."""
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.alpha or config.rank),
        target_modules=TARGETS[config.targets],  # type: ignore[arg-type]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(PeftModel, get_peft_model(cast(nn.Module, unet), peft_config))  # type: ignore[arg-type]


def load_lora(unet: UNet2DConditionModel, adapter: Path) -> nn.Module:
    """The UNet with a saved adapter merged into its weights."""
    return PeftModel.from_pretrained(cast(nn.Module, unet), adapter).merge_and_unload()  # type: ignore[arg-type]
