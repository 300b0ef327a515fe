"""Puts another autoencoder into a model in diffusers' layout."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError

from d2f_core.model.safetensors_header import HeaderError, TensorHeader, read_header
from d2f_core.model.single_file.keys import AUTOENCODER, Entry, LayoutError, vae_entries
from d2f_core.model.single_file.tensor_file import TensorReader, writing
from d2f_core.model.weight_files import DIFFUSERS_NAME, shard_names, with_plain_names


class VaeError(ValueError):
    """An autoencoder that cannot be put in: the rule and the fix, which follow its URI."""


@dataclass(frozen=True, kw_only=True)
class VaeFile:
    """An autoencoder as one file, found to hold every tensor that a config asks for."""

    reader: TensorReader
    headers: Mapping[str, TensorHeader]
    entries: tuple[Entry, ...]

    def write(self, target: Path) -> None:
        """Write its weights in diffusers' names, in the file's dtypes."""
        shapes = _empty_shapes(json.loads((target.parent / "config.json").read_text()))
        made = {
            name: (self.headers[entry.key].dtype, tuple(shapes[name])) for entry in self.entries for name in entry.names
        }
        with writing(target, made, {"format": "pt"}) as out:
            for entry in self.entries:
                for name, tensor in zip(entry.names, entry.part(self.reader(entry.key)), strict=True):
                    out.write(name, tensor)


def open_vae_file(file: Path, config: Mapping[str, Any]) -> VaeFile:
    """Check an autoencoder's file by its header; its names may be diffusers' or the original layout's, with or without
    `first_stage_model.` before them.

    Args:
        config: of the model's present autoencoder.

    Raises:
        VaeError: the file is damaged, or no autoencoder of this config.
    """
    try:
        headers, reader = read_header(file), TensorReader([file])
    except (HeaderError, SafetensorError) as error:
        raise VaeError(str(error)) from None
    shapes = _empty_shapes(config)
    tables = _tables(shapes, config)
    entries = max(tables, key=lambda table: sum(entry.key in headers for entry in table))
    fix = "Give an autoencoder of this model's family, or a directory in diffusers' layout with its own config.json."
    if missing := sorted(entry.key for entry in entries if entry.key not in headers):
        raise VaeError(f"lacks {len(missing)} tensors of the model's autoencoder, such as {missing[:3]}. {fix}")
    for entry in entries:
        wanted = entry.join([torch.empty(shapes[name], device="meta") for name in entry.names]).shape
        found = headers[entry.key].shape
        if found != tuple(wanted) and (*found, 1, 1) != tuple(wanted):
            raise VaeError(f"has {entry.key!r} in the shape {list(found)}, the model's has {list(wanted)}. {fix}")
    return VaeFile(reader=reader, headers=headers, entries=entries)


def _empty_shapes(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        network = cast(Any, AutoencoderKL).from_config(dict(config))
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _tables(shapes: Mapping[str, torch.Size], config: Mapping[str, Any]) -> list[tuple[Entry, ...]]:
    """The ways in which files name an autoencoder's tensors."""
    diffusers = tuple(Entry(key=name, names=(name,)) for name in shapes)
    try:
        original = vae_entries(shapes, config)
    except LayoutError:
        return [diffusers]
    bare = (Entry(key=each.key.removeprefix(AUTOENCODER), names=each.names, form=each.form) for each in original)
    return [diffusers, tuple(original), tuple(bare)]


def vae_directory(directory: Path) -> Path:
    """Where an autoencoder lies in a directory: in its `vae/`, or the directory itself.

    Raises:
        VaeError: in neither place.
    """
    for place in (directory / "vae", directory):
        config = place / "config.json"
        if config.is_file() and json.loads(config.read_text()).get("_class_name") == "AutoencoderKL":
            return place
    raise VaeError(
        "has no config.json of an AutoencoderKL, in itself or in vae/. Give an autoencoder in diffusers' layout, or "
        "its .safetensors."
    )


def put_vae_directory(source: Path, target: Path) -> None:
    """Replace the autoencoder in the directory `target` by that of `source`, its config included."""
    shutil.rmtree(target)
    target.mkdir()
    lists = [file.name for file in source.glob("*.index*.json")]
    for name in ("config.json", *shard_names(source, DIFFUSERS_NAME), *lists):
        shutil.copyfile(source / name, target / name)
    with_plain_names(target, DIFFUSERS_NAME)


def put_vae_file(found: VaeFile, target: Path) -> None:
    """Replace the weights of the autoencoder in the directory `target`; its config stays."""
    for old in (*target.glob("*.safetensors"), *target.glob("*.index*.json")):
        old.unlink()
    found.write(target / DIFFUSERS_NAME)
