"""Write a trained model's files one tensor at a time, so that memory does not grow with the model.

Weights and configs equal, byte for byte, those that `save_pretrained` of diffusers (full) and of PEFT (LoRA) would
write. Two parts that depend on the machine are left out: `_name_or_path` in `unet/config.json`, the base's local path,
and PEFT's README.md, an unfilled template that contains this path.
"""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from diffusers.utils.constants import SAFE_WEIGHTS_INDEX_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from d2f_core import storage
from d2f_core.model.artifact_files import AUTO_MAPPING, ArtifactError
from d2f_core.model.description import DESCRIPTION, WEIGHTS, write_description
from d2f_core.model.lora import ADAPTER_NAME
from d2f_core.safetensors_layout import layout

FULL_NAMES = "diffusion_pytorch_model{suffix}.safetensors"
MAX_FILE_BYTES = 10 * 10**9
"""Of a UNet's weights in one file; diffusers' own default."""


@dataclass(frozen=True)
class _Place:
    """The file and key of a tensor."""

    file: str
    key: str
    """The tensor's name in the file."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The tensor's bytes in float32."""
        return 4 * math.prod(self.shape)


def save_artifact(
    directory: Path,
    network: nn.Module,
    description: Mapping[str, Any],
    weights: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write a trained network (a UNet, or PEFT's wrapper around one) with its description.

    Args:
        network: gives names, shapes and configs; may be on torch's meta device if `weights` are given.
        weights: (parameter name, float32 tensor) of every trained parameter, in any order; None: the network's own.

    Raises:
        ArtifactError: the weights belong to another network, or the disk is full.
    """
    part = directory / WEIGHTS[description["method"]]
    part.mkdir(parents=True, exist_ok=True)
    state = network.state_dict()
    if description["method"] == "lora":
        places = _adapter_places(network, state)
        _write_adapter_config(part, network)
    else:
        places = _unet_places(state)
        _write_unet_config(part, network)
        _write_index(part, places)
    _write_weights(part, places, ((name, state[name]) for name in places) if weights is None else weights)
    write_description(directory, description)


def upload_artifact(
    target: str, network: nn.Module, description: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]] | None = None
) -> None:
    """Like `save_artifact`, to a URI; replaces an artifact there, and writes the description last."""
    with tempfile.TemporaryDirectory() as directory:
        save_artifact(Path(directory), network, description, weights)
        if storage.exists(storage.join(target, DESCRIPTION)):
            for part in (DESCRIPTION, *WEIGHTS.values()):  # without it, a half-replaced model is not loaded
                storage.remove_tree(storage.join(target, part))
        storage.upload_tree(Path(directory), target, last=DESCRIPTION)


def _unet_places(state: Mapping[str, Tensor]) -> dict[str, _Place]:
    """Parameter name -> place, with a UNet split over files as diffusers does it."""
    empty = {name: tensor.to("meta") for name, tensor in state.items()}
    split = split_torch_state_dict_into_shards(empty, filename_pattern=FULL_NAMES, max_shard_size=MAX_FILE_BYTES)
    return {
        name: _Place(file, name, tuple(state[name].shape))
        for file, names in split.filename_to_tensors.items()
        for name in names
    }


def _adapter_places(network: nn.Module, state: dict[str, Tensor]) -> dict[str, _Place]:
    """Parameter name -> place, as PEFT saves an adapter: it selects tensors, which are mapped back to their names."""
    names = {id(tensor): name for name, tensor in state.items()}
    saved = get_peft_model_state_dict(cast(Any, network), state_dict=state)
    return {names[id(tensor)]: _Place(ADAPTER_NAME, key, tuple(tensor.shape)) for key, tensor in saved.items()}


def _write_unet_config(part: Path, network: nn.Module) -> None:
    cast(Any, network).save_config(part)
    config = json.loads((part / "config.json").read_text())
    config.pop("_name_or_path", None)
    (part / "config.json").write_text(_json(config))


def _write_adapter_config(part: Path, network: nn.Module) -> None:
    config = cast(PeftModel, network).peft_config["default"]
    training, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(part), auto_mapping_dict=AUTO_MAPPING)
    config.inference_mode = training


def _write_index(part: Path, places: Mapping[str, _Place]) -> None:
    """Write the index of tensors by file, if there are several files."""
    files = {name: place.file for name, place in places.items()}
    if len(set(files.values())) > 1:
        total = sum(place.size for place in places.values())
        (part / SAFE_WEIGHTS_INDEX_NAME).write_text(_json({"metadata": {"total_size": total}, "weight_map": files}))


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _write_weights(part: Path, places: Mapping[str, _Place], weights: Iterable[tuple[str, Tensor]]) -> None:
    """Create the files in full size, then write each tensor to its place as it arrives."""
    needed, free = sum(place.size for place in places.values()), shutil.disk_usage(part).free
    if needed > free:
        raise ArtifactError(
            f"the weights need {needed:,} bytes at {str(part)!r}, where {free:,} are free. Free space, or set TMPDIR "
            "to a larger disk."
        )
    left = dict(places)
    with contextlib.ExitStack() as stack:
        handles, starts = {}, {}
        for file in {place.file for place in places.values()}:
            handles[file] = stack.enter_context((part / file).open("wb"))
            starts[file] = _begin(handles[file], [place for place in places.values() if place.file == file])
        for name, tensor in weights:
            place = left.pop(name, None)
            if place is None or tuple(tensor.shape) != place.shape or tensor.dtype != torch.float32:
                wanted = f"one of torch.float32 and {list(place.shape)}" if place else "none of that name, or not twice"
                raise _misfit(f"{name!r} is of {tensor.dtype} and {list(tensor.shape)}, and the network has {wanted}")
            handles[place.file].seek(starts[place.file][place.key])
            handles[place.file].write(tensor.detach().cpu().contiguous().reshape(-1).numpy().data)
    if left:
        raise _misfit(f"{len(left)} tensors of the network are missing, such as {min(left)!r}")


def _misfit(what: str) -> ArtifactError:
    return ArtifactError(
        f"the weights do not fit the network: {what}. Use the model config that they were trained with."
    )


def _begin(handle: IO[bytes], places: Iterable[_Place]) -> dict[str, int]:
    """Write the header of a safetensors file of float32 tensors, and give it its size; key -> where its bytes begin."""
    plan = layout({place.key: ("float32", place.shape) for place in places}, {"format": "pt"})
    handle.write(plan.header)
    handle.truncate(plan.size)
    return plan.starts
