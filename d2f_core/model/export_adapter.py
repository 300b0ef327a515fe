"""A trained adapter in the layouts of other tools: a PEFT directory, and one safetensors file.

| function                  | read by                                  | how to sample it is told by |
|---------------------------|------------------------------------------|-----------------------------|
| `export_peft`             | `PeftModel.from_pretrained`              | diff2flow.json              |
| `export_single_file_lora` | ComfyUI, sd-scripts, `load_lora_weights` | the file's metadata         |
"""

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open

from d2f_core import storage
from d2f_core.model.adapter_metadata import adapter_metadata
from d2f_core.model.artifact import DESCRIPTION, ArtifactError
from d2f_core.model.caption_rules import read_rules, told_to_others
from d2f_core.model.denoiser import load_unet
from d2f_core.model.export import artifact, load_for_others
from d2f_core.model.peft_layout import CONFIG_NAME, public_name, write_peft
from d2f_core.model.sampling_metadata import sampling_metadata
from d2f_core.model.single_file_lora import (
    LayerChange,
    SingleFileLoraError,
    kohya_metadata,
    layer_changes,
    outside_blocks,
    write_ends,
    write_single_file_lora,
)
from d2f_core.objective.schedule import FLOW_PREDICTION

logger = logging.getLogger(__name__)

BASE_SHA256 = "d2f_base_sha256"
ENDS = "-ends.safetensors"
"""End of the second file's name, in place of .safetensors."""


@dataclass(frozen=True, kw_only=True)
class SingleFileExport:
    """The exported files."""

    target: str
    ends_target: str
    """The second file, with the layers at the network's ends; empty when none of them was adapted, or all is in one
    file."""
    keys: int
    """Tensors in the first file."""
    layers: int
    """Of the first file."""
    ends: tuple[str, ...]
    """Adapted layers at the network's ends: sd-scripts reads none of them."""
    has_biases: bool
    """Whether the first file holds biases, so that diffusers refuses it."""


def _adapter(model_uri: str, directory: Path, description: Mapping[str, Any]) -> Path:
    if description["method"] != "lora":
        raise ArtifactError(
            f"{model_uri!r} has method={description['method']!r}: all weights were trained and there is no adapter. "
            "Use export_diffusers."
        )
    return directory / "adapter"


def export_peft(model_uri: str, target: str) -> str:
    """Write the adapter for PEFT (adapter_config.json, adapter_model.safetensors, README.md), and diff2flow.json.

    Load it with `PeftModel.from_pretrained(unet, target)` on the base's UNet; returns `target`. The weights are copied;
    see `d2f_core.model.peft_layout` for the config. A base at a local path is named by its directory alone.

    Raises:
        ArtifactError: the model is no trained artifact, or has no adapter.
    """
    directory, description = artifact(model_uri)
    adapter, base = _adapter(model_uri, directory, description), public_name(description["base"]["uri"])
    named = {**description, "base": {**description["base"], "uri": base}}
    with tempfile.TemporaryDirectory() as temporary:
        write_peft(adapter, Path(temporary), base, told_to_others(read_rules(description)))
        Path(temporary, DESCRIPTION).write_text(json.dumps(named, indent=2, sort_keys=True) + "\n")
        storage.upload_tree(Path(temporary), target, last=CONFIG_NAME)
    return target


def _check_parametrisation(model_uri: str, description: Mapping[str, Any]) -> None:
    """Refuse an adapter that turns its base into another kind of network."""
    if description["objective"] != "flow_matching":
        return
    if (description["prediction_type"], description["naive_target"]) == (FLOW_PREDICTION, "noise_minus_data"):
        return
    raise ArtifactError(
        f"{model_uri!r} was trained by the naive flow_matching loss on a base of prediction_type="
        f"{description['prediction_type']!r}, and turns it into another kind of network. Other programs would go on "
        "sampling the base by its own kind, and no strength but 1 means anything. Export the merged network as a "
        "rectified-flow checkpoint (pipelines.export ldm), or train with objective diff2flow."
    )


def export_single_file_lora(
    model_uri: str,
    target: str,
    *,
    base_uri: str | None = None,
    dtype: torch.dtype = torch.float32,
    ends: Literal["apart", "inside"] = "apart",
) -> SingleFileExport:
    """Write a LoRA as one safetensors file for ComfyUI, Forge, sd-scripts and diffusers' `load_lora_weights`.

    Fully trained layers (`modules_to_save`) become exact LoRAs of full rank. Where the first or the last convolution is
    adapted, as with the presets `base` and `small`, they go to a second file, NAME-ends.safetensors: a LoRA to add to
    the first. See `d2f_core.model.single_file_lora` for the layout and what each program reads.

    Args:
        target: a local path or s3:// key that ends in .safetensors.
        dtype: float32 is exact; float16 halves the file.
        ends: `inside` writes one file, which ComfyUI and Forge read whole, and diffusers refuses if it has biases.

    Raises:
        ArtifactError: the model is no LoRA artifact, was trained with the naive `flow_matching` loss on a base that is
            no rectified flow, or needs joined latents.
        SingleFileLoraError: the layout cannot hold the adapter, `target` has another ending, or a foreign file is where
            the second would be.
    """
    if not target.endswith(".safetensors"):
        raise SingleFileLoraError(f"target={target!r} must end in .safetensors: that is how tools find LoRA files.")
    directory, description = artifact(model_uri)
    adapter = _adapter(model_uri, directory, description)
    _check_parametrisation(model_uri, description)
    model = load_for_others(model_uri, description, base_uri)
    changes = layer_changes(cast(PeftModel, PeftModel.from_pretrained(cast(Any, load_unet(model.base)), adapter)))
    outside = outside_blocks(changes)
    apart = outside if ends == "apart" and len(outside) < len(changes) else {}
    first = {name: change for name, change in changes.items() if name not in apart}
    metadata = {
        **kohya_metadata(first),
        **sampling_metadata(description),
        **adapter_metadata(model.base, Path(target).stem, model.default_size),
    }
    second = target.removesuffix(".safetensors") + ENDS
    keys = _write_files(target, first, second, apart, metadata, dtype)
    return SingleFileExport(
        target=target,
        ends_target=second if apart else "",
        keys=keys,
        layers=len(first),
        ends=tuple(outside),
        has_biases=any(change.bias is not None for change in first.values()),
    )


def _write_files(
    target: str,
    first: Mapping[str, LayerChange],
    second: str,
    apart: Mapping[str, LayerChange],
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> int:
    """Write the file, and the second if there is something for it; returns the number of keys of the first."""
    _clear_second(second, wanted=bool(apart))
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "lora.safetensors")
        if apart:
            write_ends(file, apart, metadata, dtype)
            storage.write_bytes(second, file.read_bytes())
        keys = write_single_file_lora(file, first, metadata, dtype)
        storage.write_bytes(target, file.read_bytes())
    return keys


def _clear_second(second: str, *, wanted: bool) -> None:
    """Delete the second file of an earlier export, which would not fit; anything else there is not ours to delete.

    Raises:
        SingleFileLoraError: something else is there, and the place is wanted.
    """
    taken = storage.file_exists if storage.is_s3(second) else storage.exists  # on S3, a prefix is in no file's way
    if _is_exported(second):
        storage.remove_tree(second)
    elif taken(second):
        if wanted:
            raise SingleFileLoraError(
                f"{second!r}, where the second file goes, is not one that this project exported. Move it, or give "
                "another target."
            )
        logger.info("left %s as it is: this project did not export it", second)


def _is_exported(uri: str) -> bool:
    """Whether there is a safetensors file that says the hash of the base that it belongs to."""
    if not storage.file_exists(uri):
        return False
    with storage.local_file(uri) as file:
        try:
            with safe_open(file, framework="pt") as opened:
                return BASE_SHA256 in (opened.metadata() or {})
        except SafetensorError:
            return False
