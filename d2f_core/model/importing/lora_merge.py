"""Adds LoRA files to the weights of a model in diffusers' layout, one tensor at a time."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from d2f_core.model.fit import header_tensors
from d2f_core.model.importing.lora_keys import LoraFileError, Place, Role, Shapes, names_of_layers, placed
from d2f_core.model.safetensors_header import HeaderError, TensorHeader, read_header
from d2f_core.model.single_file.tensor_file import TensorReader, writing
from d2f_core.model.weight_files import NAMES, shard_names

PEFT_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings in a file's metadata."""
MERGED = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file whose every key has its place in a model."""

    reader: TensorReader
    strength: float
    changes: Mapping[Place, Mapping[Role, str]]
    scales: Mapping[Place, float]
    """Factors of the products, of layers without an alpha of their own."""

    def weight(self, place: Place, shape: torch.Size) -> Tensor | None:
        """What is added to a layer's weight, float32 of its `shape`; None: nothing."""
        keys = self.changes.get(place, {})
        if "weight" in keys:
            return self.strength * self.reader(keys["weight"]).float().reshape(shape)
        if "down" not in keys:
            return None
        down, up = self.reader(keys["down"]).float(), self.reader(keys["up"]).float()
        return (self.strength * self._scale(place)) * (up.flatten(1) @ down.flatten(1)).reshape(shape)

    def bias(self, place: Place) -> Tensor | None:
        """What is added to a layer's bias, float32; None: nothing."""
        key = self.changes.get(place, {}).get("bias", "")
        if not key:
            return None
        factor = self._scale(place) if key.endswith(".lora_B.bias") else 1.0
        return self.strength * factor * self.reader(key).float()

    def _scale(self, place: Place) -> float:
        keys = self.changes[place]
        if "alpha" in keys and "down" in keys:
            return float(self.reader(keys["alpha"])) / len(self.reader(keys["down"]))
        return self.scales.get(place, 1.0)


def layer_shapes(base: Path) -> dict[str, dict[str, torch.Size]]:
    """The shapes of a model's tensors that LoRAs may change.

    Raises:
        HeaderError: its files are missing or damaged.
    """
    return {
        part: {name: tensor.shape for name, tensor in header_tensors(base / part, NAMES[part]).items()}
        for part in MERGED
        if (base / part / "config.json").is_file()
    }


def open_lora(file: Path, strength: float, shapes: Shapes, unet_config: Mapping[str, Any], prediction: str) -> Lora:
    """Find the place of each of a LoRA file's tensors, by its header.

    Args:
        shapes: of the model's tensors, as by `layer_shapes`.
        prediction: what the model's network predicts, as diffusers spells it.

    Raises:
        LoraFileError: the file is damaged, another kind of adapter, or one of another model.
    """
    try:
        header, reader = read_header(file), TensorReader([file])
    except (HeaderError, SafetensorError) as error:
        raise LoraFileError(str(error)) from None
    trained = reader.metadata.get("d2f_prediction_type", prediction)
    if trained != prediction:
        raise LoraFileError(
            f"was trained on a network that predicts {trained}, and this one predicts {prediction}. Give the base that "
            "it was trained on."
        )
    changes = placed(header.keys(), names_of_layers(shapes, unet_config))
    for place, keys in changes.items():
        _check_shapes(place, keys, header, shapes[place.part])
    return Lora(reader=reader, strength=strength, changes=changes, scales=_peft_scales(reader.metadata, changes))


def _check_shapes(
    place: Place, keys: Mapping[Role, str], header: Mapping[str, TensorHeader], tensors: Mapping[str, torch.Size]
) -> None:
    """Raise LoraFileError unless a layer's factors make up a change of its weight."""
    wanted, given = tensors[f"{place.module}.weight"], {role: header[key].shape for role, key in keys.items()}
    made: tuple[int, ...] = tuple(given.get("weight", wanted))
    if "down" in given:
        down, up = given["down"], given["up"]
        made = (*up[:1], *down[1:]) if math.prod(up[1:]) == math.prod(down[:1]) else ()
    bias, own = given.get("bias"), tensors.get(f"{place.module}.bias")
    if _plain(made) != _plain(wanted) or (bias is not None and bias != own):
        raise LoraFileError(
            f"changes the layer {place.module!r} in the shapes {[list(shape) for shape in given.values()]}, and the "
            f"model's weight has {list(wanted)}. Give a LoRA of this model's family."
        )


def _plain(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the sizes of a 1x1 convolution, which some programs leave out."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def _peft_scales(metadata: Mapping[str, str], places: Iterable[Place]) -> dict[Place, float]:
    """The factors that PEFT's settings give to layers, where a file keeps them in its metadata."""
    try:
        settings = json.loads(metadata.get(PEFT_METADATA, "{}"))
    except json.JSONDecodeError:
        raise LoraFileError(f"has {PEFT_METADATA} that are no JSON. Save it again.") from None
    found = {}
    for place in places:
        own = {name.removeprefix(f"{place.part}."): value for name, value in settings.items()}
        if "lora_alpha" in own and "r" in own:
            rank = _by_pattern(own.get("rank_pattern"), place.module, own["r"])
            alpha = _by_pattern(own.get("alpha_pattern"), place.module, own["lora_alpha"])
            found[place] = alpha / (math.sqrt(rank) if own.get("use_rslora") else rank)
    return found


def _by_pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's setting for a layer: its own, by the end of its name, or the adapter's."""
    for name, value in (pattern or {}).items():
        if module == name or module.endswith(f".{name}"):
            return value
    return default


@torch.no_grad()
def merge_loras(base: Path, loras: Sequence[Lora]) -> None:
    """Add LoRAs to a model's weights, in its directory. Sums are made in float32 and stored in the weights' dtypes.

    Raises:
        LoraFileError: a sum is no number that the weights' dtype holds.
    """
    for part in {place.part for lora in loras for place in lora.changes}:
        directory, plain = base / part, NAMES[part]
        files = [directory / name for name in shard_names(directory, plain)]
        headers = {name: tensor for file in files for name, tensor in read_header(file).items()}
        reader, made = TensorReader(files), directory / f"{plain}.merged"
        with writing(made, {name: (each.dtype, each.shape) for name, each in headers.items()}, reader.metadata) as out:
            for name in headers:
                out.write(name, _merged(name, reader(name), part, loras))
        for old in (*files, *directory.glob("*.index*.json")):
            old.unlink(missing_ok=True)
        made.rename(directory / plain)


def _merged(name: str, tensor: Tensor, part: str, loras: Sequence[Lora]) -> Tensor:
    """A tensor with what LoRAs add to it; the same one when that is nothing."""
    module, _, kind = name.rpartition(".")
    place = Place(part, module)
    added = [lora.weight(place, tensor.shape) if kind == "weight" else lora.bias(place) for lora in loras]
    changes = [change for change in added if change is not None] if kind in ("weight", "bias") else []
    if not changes:
        return tensor
    total = (tensor.float() + sum(changes)).to(tensor.dtype)
    if not total.isfinite().all():
        raise LoraFileError(
            f"makes {part}'s {name!r} a number that {tensor.dtype} cannot hold. Lower its strength, or give the "
            "checkpoint in float32."
        )
    return total
