"""Config of importing a checkpoint. Imports no torch, because it is read at the prompt."""

import math
from dataclasses import dataclass

from d2f_core.model.config import PredictionName


class ImportCheckpointError(ValueError):
    """A checkpoint cannot be imported as asked; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class ImportCheckpointConfig:
    source: str = ""
    """What is imported: one .safetensors in the original layout of SD 1.5, SD 2.1 or SDXL, or a directory in diffusers'
    layout, local or s3://, or a hub id, as owner/name@revision."""
    output: str = ""
    """Directory to write in diffusers' layout, s3:// or local, for --model.base of a finetuning; the same command does
    nothing once it is there."""
    vae: str = ""
    """Autoencoder that takes the place of the checkpoint's own: its .safetensors, or a directory with an AutoencoderKL
    or a whole model; local, s3:// or a hub id."""
    lora: tuple[str, ...] = ()
    """LoRA files that are merged in, each a .safetensors with its strength: style.safetensors:0.8. As sd-scripts,
    ComfyUI, diffusers or PEFT writes them."""
    prediction: PredictionName = ""
    """What the network predicts, where the checkpoint says it wrongly or not at all; empty: as it says."""
    zero_snr: bool | None = None
    """Whether a v-prediction network was trained with zero terminal SNR, where the checkpoint does not say so; None: as
    it says."""

    def __post_init__(self) -> None:
        for each in self.lora:
            lora_and_strength(each)


def lora_and_strength(text: str) -> tuple[str, float]:
    """The URI and the strength of FILE or FILE:STRENGTH.

    Raises:
        ImportCheckpointError: no .safetensors, or a strength that is 0 or no number.
    """
    uri, colon, number = text.rpartition(":")
    if not colon or number.endswith(".safetensors"):
        uri, number = text, "1"
    if not uri.endswith(".safetensors"):
        raise ImportCheckpointError(f"lora={text!r} must be a .safetensors file, as FILE or FILE:0.8.")
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength) or strength == 0:
        raise ImportCheckpointError(f"lora={text!r} has the strength {number!r}, which must be a number other than 0.")
    return uri, strength
