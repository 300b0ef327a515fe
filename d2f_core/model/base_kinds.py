"""Kinds of models that look like a base and are none: told by their configs, before weights are read.

| refused                                        | told by                                                        |
|------------------------------------------------|----------------------------------------------------------------|
| inpainting, upscaling, editing, depth as input | `in_channels` beside `out_channels`                            |
| latent consistency models                      | `time_cond_proj_dim`                                           |
| SDXL's refiner                                 | `requires_aesthetics_score`, or its second text encoder alone  |
| networks that read classes or images           | `class_embed_type`, `num_class_embeds`, `encoder_hid_dim_type` |
| other UNets, autoencoders and text encoders    | `_class_name`, `model_type`                                    |
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

INPUTS = {
    5: "a depth map or a mask is joined to its latents",
    7: "a small picture is joined to its latents, as for upscaling",
    8: "a picture's latents are joined to its own, as for editing or depth",
    9: "a mask and a masked picture are joined to its latents, as for inpainting",
}
"""Input channels of a published UNet with four outputs -> what it reads."""
CONDITIONS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
CLIP = ("clip_text_model", "clip")
FAMILIES = "SD 1.5, SD 2.1 or SDXL"


def why_not(directory: Path) -> str:
    """Why a directory in diffusers' layout is no base model: value, rule and fix, to follow its URI. Empty: it may be.

    Args:
        directory: has a unet/config.json.
    """
    read: Callable[[str], dict[str, Any]] = lambda name: _read(directory / name)  # noqa: E731
    unet, vae, index = read("unet/config.json"), read("vae/config.json"), read("model_index.json")
    encoders = {part: read(f"{part}/config.json") for part in ("text_encoder", "text_encoder_2")}
    # A UNet that reads both encoders is as wide as both; one that misses the first by accident is told so elsewhere.
    reads_second = not (directory / "text_encoder").is_dir() and (
        encoders["text_encoder_2"].get("hidden_size") == unet.get("cross_attention_dim")
    )
    is_sdxl = unet.get("addition_embed_type") == "text_time"
    if is_sdxl and (index.get("requires_aesthetics_score") or reads_second):
        return (
            "is SDXL's refiner, which reads an aesthetic score and its second text encoder alone, and finishes what "
            "SDXL begins. Give SDXL's base model."
        )
    return _unet_refusal(unet) or _autoencoder_refusal(vae, unet) or _encoder_refusal(encoders)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def _unet_refusal(config: dict[str, Any]) -> str:
    if (name := config.get("_class_name", "UNet2DConditionModel")) != "UNet2DConditionModel":
        return f"has a {name} in unet/, not a UNet2DConditionModel. Give a model of {FAMILIES}."
    if width := config.get("time_cond_proj_dim"):
        return (
            f"has time_cond_proj_dim={width} in unet/config.json: a latent consistency model, which reads the guidance "
            "as an input that must be empty here. Give the model that it was distilled from."
        )
    inputs, outputs = config.get("in_channels", 4), config.get("out_channels", 4)
    if inputs != outputs:
        reads = f": {INPUTS[inputs]}" if outputs == 4 and inputs in INPUTS else ""
        return (
            f"has a UNet with in_channels={inputs} and out_channels={outputs}{reads}. A base reads as many channels as "
            "it puts out: give the text-to-image model that it was made from."
        )
    if given := [name for name in CONDITIONS if config.get(name) is not None]:
        return (
            f"has a UNet with {given[0]}={config[given[0]]!r}, a condition beside the text that must be empty here. "
            f"Give a model of {FAMILIES}."
        )
    return ""


def _autoencoder_refusal(vae: dict[str, Any], unet: dict[str, Any]) -> str:
    if (name := vae.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        return (
            f"has an {name} in vae/, which gives no mean and deviation of its latents as an AutoencoderKL does. Copy "
            "the vae directory of the original model."
        )
    channels, wanted = vae.get("latent_channels", 4), unet.get("out_channels", 4)
    if vae and channels != wanted:
        return (
            f"has an autoencoder of latent_channels={channels} and a UNet of {wanted}: they must be equal. Copy the "
            "vae directory of the original model."
        )
    return ""


def _encoder_refusal(encoders: dict[str, dict[str, Any]]) -> str:
    for part, config in encoders.items():
        if (kind := config.get("model_type", CLIP[0])) not in CLIP:
            return (
                f"has model_type={kind!r} in {part}/config.json, and text encoders must be CLIP's. Copy {part}/ and "
                "its tokenizer of the original model."
            )
    return ""
