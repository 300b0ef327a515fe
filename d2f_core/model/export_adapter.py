"""A trained adapter in the layouts of other tools: a PEFT directory, and one safetensors file.

| function                  | read by                                  | how to sample it is told by |
|---------------------------|------------------------------------------|-----------------------------|
| `export_peft`             | `PeftModel.from_pretrained`              | diff2flow.json              |
| `export_single_file_lora` | ComfyUI, sd-scripts, `load_lora_weights` | the file's metadata         |
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel

from d2f_core import storage
from d2f_core.model.artifact import DESCRIPTION, ArtifactError
from d2f_core.model.base import is_sdxl
from d2f_core.model.denoiser import load_unet
from d2f_core.model.diffusers_layout import copy_part, read_json
from d2f_core.model.diffusers_scheduler import SCHEDULE_FIELDS
from d2f_core.model.export import artifact, load_for_others
from d2f_core.model.sampling import SCHEDULERS
from d2f_core.model.single_file_lora import (
    SingleFileLoraError,
    kohya_metadata,
    layer_changes,
    passed_over_by_kohya,
    write_single_file_lora,
)

SD_VERSIONS = {768: ("sd_v1", "False"), 1024: ("sd_v2", "True")}
"""Width of the text states -> sd-scripts' name of the base model, and its `v2` flag."""


@dataclass(frozen=True, kw_only=True)
class SingleFileExport:
    """The exported file, and the layers that some readers ignore."""

    target: str
    keys: int
    layers: int
    trained_biases: tuple[str, ...]
    """Layers with a `diff_b`: diffusers refuses such a file, sd-scripts ignores the biases."""
    passed_over_by_kohya: tuple[str, ...]
    """Layers that sd-scripts ignores."""


def _adapter(model_uri: str, directory: Path, description: Mapping[str, Any]) -> Path:
    if description["method"] != "lora":
        raise ArtifactError(
            f"{model_uri!r} has method={description['method']!r}: all weights were trained and there is no adapter. "
            "Use export_diffusers."
        )
    return directory / "adapter"


def export_peft(model_uri: str, target: str) -> str:
    """Write the PEFT adapter unchanged (adapter_config.json, adapter_model.safetensors), with diff2flow.json beside it.

    Load it with `PeftModel.from_pretrained(unet, target)` on the base's UNet; returns `target`.

    Raises:
        ArtifactError: the model is no trained artifact, or has no adapter.
    """
    directory, description = artifact(model_uri)
    adapter = _adapter(model_uri, directory, description)
    with tempfile.TemporaryDirectory() as temporary:
        copy_part(adapter, Path(temporary))
        shutil.copyfile(directory / DESCRIPTION, Path(temporary) / DESCRIPTION)
        storage.upload_tree(Path(temporary), target, last="adapter_config.json")
    return target


def _lora_metadata(description: Mapping[str, Any], width: int | None) -> dict[str, str]:
    """The sampling settings as safetensors metadata, a mapping of strings."""
    sampling, schedule = description["sampling"], description["schedule"]
    metadata = {
        "d2f_format_version": str(description["format_version"]),
        "d2f_objective": description["objective"],
        "d2f_prediction_type": description["prediction_type"],
        "d2f_sampler": sampling["solver"] if sampling["solver"] in SCHEDULERS else f"{sampling['solver']} in flow time",
        "d2f_steps": str(sampling["steps"]),
        "d2f_guidance": str(sampling["guidance"]),
        "d2f_shift": str(sampling.get("shift", 1.0)),
        "d2f_time_convention": description["time_convention"],
        "d2f_schedule": json.dumps({name: schedule[name] for name in SCHEDULE_FIELDS if name in schedule}),
        "d2f_base_sha256": description["base"]["sha256"],
    }
    if width in SD_VERSIONS:
        metadata["ss_base_model_version"], metadata["ss_v2"] = SD_VERSIONS[width]
    return metadata


def export_single_file_lora(
    model_uri: str, target: str, *, base_uri: str | None = None, dtype: torch.dtype = torch.float32
) -> SingleFileExport:
    """Write a LoRA as one safetensors file for ComfyUI, sd-scripts and diffusers' `load_lora_weights`.

    Fully trained layers (`modules_to_save`) become exact LoRAs of full rank; their biases have a key that only ComfyUI
    reads. See `d2f_core.model.single_file_lora` for the layout and what each tool reads.

    Args:
        target: a local path or s3:// key that ends in .safetensors.
        dtype: float32 is exact; float16 halves the file.

    Raises:
        ArtifactError: the model is no LoRA artifact, was trained with the naive `flow_matching` loss, or needs joined
            latents.
        SingleFileLoraError: the layout cannot hold the adapter, or `target` has another ending.
    """
    if not target.endswith(".safetensors"):
        raise SingleFileLoraError(f"target={target!r} must end in .safetensors: that is how tools find LoRA files.")
    directory, description = artifact(model_uri)
    adapter = _adapter(model_uri, directory, description)
    base = load_for_others(model_uri, description, base_uri).base
    changes = layer_changes(cast(PeftModel, PeftModel.from_pretrained(cast(Any, load_unet(base)), adapter)))
    biases = tuple(name for name, change in changes.items() if change.bias is not None)
    unet = read_json(base.path / "unet/config.json")
    metadata = {
        **kohya_metadata(changes),
        **_lora_metadata(description, unet.get("cross_attention_dim")),
        "ss_output_name": Path(target).stem,
    }
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "lora.safetensors"
        keys = write_single_file_lora(file, changes, metadata, dtype)
        storage.write_bytes(target, file.read_bytes())
    passed_over = passed_over_by_kohya(changes, sdxl=is_sdxl(unet))
    return SingleFileExport(
        target=target, keys=keys, layers=len(changes), trained_biases=biases, passed_over_by_kohya=passed_over
    )
