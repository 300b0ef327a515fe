"""How LoRA files name the layers of Stable Diffusion, and which tensors of a model each of their keys belongs to.

| layout                                | a layer's name                           | its factors                    |
|---------------------------------------|------------------------------------------|--------------------------------|
| kohya's sd-scripts, ComfyUI, Civitai  | `lora_unet_down_blocks_0_attentions_0_…` | lora_down, lora_up, alpha      |
| the same, SDXL                        | `lora_unet_input_blocks_4_1_…`           | lora_down, lora_up, alpha      |
| the same, text encoders               | `lora_te_…`, `lora_te1_…`, `lora_te2_…`  | lora_down, lora_up, alpha      |
| diffusers                             | `unet.…`, `text_encoder.…`               | lora_A, lora_B or lora.down, … |
| PEFT                                  | `base_model.model.…`                     | lora_A, lora_B                 |
| ComfyUI's own names                   | `diffusion_model.input_blocks.4.1.…`     | lora_down, lora_up             |

Some files also hold the change of a bias (`diff_b`) or of a whole weight (`diff`). Names are not translated: the
model's own tensors are listed under all names that a layout has for them, so that a key has one place or none.

Sources: kohya-ss/sd-scripts networks/lora.py; ComfyUI comfy/lora.py; diffusers loaders/lora_conversion_utils.py.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Size

from d2f_core.model.single_file.family import TEXT_MODEL
from d2f_core.model.single_file.keys import UNET, LayoutError, unet_entries

Role = Literal["down", "up", "alpha", "weight", "bias"]

ROLES: Mapping[str, Role] = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
    ".diff": "weight",
    ".diff_b": "bias",
    ".lora_B.bias": "bias",
}
"""End of a key -> what its tensor is."""
OTHERS = {
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lora_mid": "a LoCon in three factors",
    "oft_": "an OFT",
    ".on_input": "an IA3",
    "glora": "a GLoRA",
    "b_norm": "a LoRA with trained norms",
    "w_norm": "a LoRA with trained norms",
}
"""Part of a key -> adapters that are not a product of two factors."""
TEXT_ENCODERS = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
FORMATS = "kohya's sd-scripts, ComfyUI, diffusers or PEFT"


class LoraFileError(ValueError):
    """A LoRA file that cannot be merged: the rule and the fix, which follow the file's name."""


@dataclass(frozen=True, order=True)
class Place:
    """A linear or convolutional layer of a model."""

    part: str
    """Directory in diffusers' layout."""
    module: str
    """Name of its tensors in the part's files, without `.weight`."""


Shapes = Mapping[str, Mapping[str, Size]]
"""Part -> name of a tensor in its files -> its shape."""


def names_of_layers(shapes: Shapes, unet_config: Mapping[str, Any]) -> dict[str, Place]:
    """Every name that a LoRA file may have for a layer -> the layer.

    Args:
        unet_config: in diffusers' spelling, by which the names in the original layout are found.
    """
    found: dict[str, Place] = {}
    for part, tensors in shapes.items():
        modules = [name.removesuffix(".weight") for name, shape in tensors.items() if _is_layer(name, shape)]
        original = _original_names(modules, unet_config) if part == "unet" else {}
        for module in modules:
            found |= dict.fromkeys(_names(part, module, original.get(module, "")), Place(part, module))
    return found


def _is_layer(name: str, shape: Size) -> bool:
    return name.endswith(".weight") and len(shape) in (2, 4)


def _original_names(modules: Collection[str], unet_config: Mapping[str, Any]) -> dict[str, str]:
    """Name of a UNet's layer in diffusers -> in the original layout, if that has names for this UNet."""
    try:
        entries = unet_entries([f"{module}.weight" for module in modules], unet_config)
    except LayoutError:
        return {}
    return {entry.names[0].removesuffix(".weight"): entry.key[len(UNET) :].removesuffix(".weight") for entry in entries}


def _names(part: str, module: str, original: str) -> Iterator[str]:
    if part == "unet":
        processor = re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1", module)
        yield from (f"lora_unet_{_flat(module)}", f"unet.{module}", f"base_model.model.{module}", module)
        yield from (f"unet.{processor}", processor, f"unet.{module.replace('.to_', '.processor.to_')}")
        if original:
            yield from (f"lora_unet_{_flat(original)}", f"diffusion_model.{original}", f"{UNET}{original}")
    else:
        inside = module.removeprefix(TEXT_MODEL)
        for name in (inside, TEXT_MODEL + inside):
            yield f"{part}.{name}"
            yield from (f"{prefix}{_flat(name)}" for prefix in TEXT_ENCODERS[part])


def _flat(name: str) -> str:
    return name.replace(".", "_")


def placed(keys: Collection[str], layers: Mapping[str, Place]) -> dict[Place, dict[Role, str]]:
    """A file's keys by the layers that they change.

    Args:
        layers: of the model, as by `names_of_layers`.

    Raises:
        LoraFileError: the file is another kind of adapter, or has keys for which the model has no layer.
    """
    for sign, kind in OTHERS.items():
        if odd := sorted(key for key in keys if sign in key):
            raise LoraFileError(
                f"is {kind} (it has {odd[0]!r}), and what is merged are LoRAs of two factors, as {FORMATS} writes "
                "them. Merge it in the program that made it, and give the whole checkpoint."
            )
    found, lost = dict[Place, dict[Role, str]](), list[str]()
    for key in sorted(keys):
        end = max((end for end in ROLES if key.endswith(end)), key=len, default="")
        place = layers.get(key.removesuffix(end)) if end else None
        if place is None:
            lost.append(key)
            continue
        roles, role = found.setdefault(place, {}), ROLES[end]
        if role in roles and role != "bias":  # which some files say twice, for different programs
            raise LoraFileError(f"changes one layer by {roles[role]!r} and by {key!r}. Give a file with one of them.")
        roles[role] = key
    if lost:
        raise LoraFileError(
            f"has {len(lost)} of {len(keys)} keys for which the model has no layer, such as {lost[:3]}. Give a LoRA "
            f"of this model's family, as {FORMATS} writes it."
        )
    for place, roles in found.items():
        if {"down", "up"} & roles.keys() not in ({"down", "up"}, set()) or roles.keys() == {"alpha"}:
            raise LoraFileError(f"has {sorted(roles.values())} alone of the layer {place.module!r}. Copy it again.")
    return found
