"""Models that people have and that are no base: each writes its mark into a tiny base, as published models carry it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Case = Callable[[Path], None]


def fields(name: str, **values: Any) -> Case:
    """Set fields of a config."""

    def write(base: Path) -> None:
        file = base / name
        before = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**before, **values}))

    return write


def without_first_encoder(base: Path) -> None:
    """SDXL's refiner holds its second encoder alone."""
    fields("unet/config.json", addition_embed_type="text_time")(base)
    (base / "text_encoder").rename(base / "text_encoder_2")


def pickles(part: str) -> Case:
    """Weights in .bin alone."""

    def write(base: Path) -> None:
        for file in (base / part).glob("*.safetensors"):
            name = "diffusion_pytorch_model.bin" if part in ("unet", "vae") else "pytorch_model.bin"
            torch.save(load_file(file), base / part / name)
            file.unlink()

    return write


REFUSED: dict[str, tuple[Case, str]] = {
    "a latent consistency model": (
        fields("unet/config.json", time_cond_proj_dim=256),
        r"has time_cond_proj_dim=256 in unet/config.json: .* Give the model that it was distilled from",
    ),
    "a model for inpainting": (
        fields("unet/config.json", in_channels=9),
        r"in_channels=9 and out_channels=4: a mask and a masked picture are joined .*: give the text-to-image model",
    ),
    "a model that edits pictures": (
        fields("unet/config.json", in_channels=8),
        r"in_channels=8 .* for editing",
    ),
    "an upscaler": (fields("unet/config.json", in_channels=7), r"in_channels=7 .* for upscaling"),
    "a model of depth to image": (fields("unet/config.json", in_channels=5), r"in_channels=5 .* a depth map or a mask"),
    "a model of images to images": (
        fields("unet/config.json", class_embed_type="projection"),
        r"class_embed_type='projection', a condition beside the text that must be empty",
    ),
    "SDXL's refiner": (without_first_encoder, r"is SDXL's refiner, which reads an aesthetic score .* Give SDXL's base"),
    "a UNet of video": (
        fields("unet/config.json", _class_name="UNetMotionModel"),
        r"has a UNetMotionModel in unet/, not a UNet2DConditionModel",
    ),
    "AutoencoderTiny": (
        fields("vae/config.json", _class_name="AutoencoderTiny"),
        r"has an AutoencoderTiny in vae/, which gives no mean and deviation .* Copy the vae directory",
    ),
    "an autoencoder of 16 channels": (
        fields("vae/config.json", latent_channels=16),
        r"an autoencoder of latent_channels=16 and a UNet of 4: they must be equal",
    ),
    "a text encoder of BERT": (
        fields("text_encoder/config.json", model_type="bert"),
        r"has model_type='bert' in text_encoder/config.json, and text encoders must be CLIP's",
    ),
    "a text encoder of T5": (
        fields("text_encoder/config.json", model_type="t5"),
        r"has model_type='t5' in text_encoder/config.json",
    ),
    "a UNet in .bin alone": (pickles("unet"), r"no safetensors in unet/, but \.bin files, .*convert them: python -c "),
    "an autoencoder in .bin alone": (pickles("vae"), r"no safetensors in vae/, but \.bin files, .*: python -c "),
    "a text encoder in .bin alone": (
        pickles("text_encoder"),
        r"no safetensors in text_encoder/, but \.bin files, .*: python -c ",
    ),
}
"""As docs/models.md names them: what makes a base one of them, and how it is refused."""
