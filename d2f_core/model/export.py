"""A trained artifact in the layouts of other tools: a diffusers directory, a PEFT adapter, a single-file LoRA.

| function                  | read by                                  | weights       | how to sample it is told by |
|---------------------------|------------------------------------------|---------------|-----------------------------|
| `export_diffusers`        | `DiffusionPipeline.from_pretrained`      | a merged UNet | the scheduler and README.md |
| `export_peft`             | `PeftModel.from_pretrained`              | the adapter   | diff2flow.json              |
| `export_single_file_lora` | ComfyUI, sd-scripts, `load_lora_weights` | the adapter   | the file's metadata         |

An exported diffusers directory is still an artifact that `load_model` reads. Nothing exported can run code:
safetensors, JSON and vocabularies only.
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
from d2f_core.model.artifact import DESCRIPTION, ArtifactError, TrainedModel, load_model, read_description
from d2f_core.model.base import is_sdxl, local_copy
from d2f_core.model.denoiser import load_unet
from d2f_core.model.description import write_description
from d2f_core.model.diffusers_layout import MODEL_INDEX, copy_base_parts, copy_part, read_json
from d2f_core.model.diffusers_scheduler import SCHEDULE_FIELDS, Diff2FlowScheduler
from d2f_core.model.sampling import SCHEDULERS
from d2f_core.model.single_file_lora import (
    SingleFileLoraError,
    kohya_metadata,
    layer_changes,
    passed_over_by_kohya,
    write_single_file_lora,
)

SCHEDULER_MODULE = Diff2FlowScheduler.__module__
SD_VERSIONS = {768: ("sd_v1", "False"), 1024: ("sd_v2", "True")}
"""Width of the text states -> sd-scripts' name of the base model, and its `v2` flag."""


@dataclass(frozen=True, kw_only=True)
class DiffusersExport:
    """The exported directory, and the parts that a user has to add."""

    target: str
    missing: Mapping[str, str]
    """Missing part of the pipeline -> reason. Pass these to `from_pretrained` by name, as objects or None."""


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


def _artifact(model_uri: str) -> tuple[Path, dict[str, Any]]:
    """The artifact's local directory and its description."""
    directory = local_copy(model_uri)
    if not (directory / DESCRIPTION).is_file():
        raise ArtifactError(
            f"{model_uri!r} has no {DESCRIPTION}: it is a base model, and nothing of it was trained. Give the output "
            "of a finetuning."
        )
    return directory, read_description(directory)


def _adapter(model_uri: str, directory: Path, description: Mapping[str, Any]) -> Path:
    if description["method"] != "lora":
        raise ArtifactError(
            f"{model_uri!r} has method={description['method']!r}: all weights were trained and there is no adapter. "
            "Use export_diffusers."
        )
    return directory / "adapter"


def _load_for_others(model_uri: str, description: Mapping[str, Any], base_uri: str | None) -> TrainedModel:
    """The model with its adapter merged, checked to be one that other tools can sample."""
    if description["objective"] == "flow_matching":
        raise ArtifactError(
            f"{model_uri!r} was trained by the naive flow_matching loss: its network puts out velocities, which no "
            "sampler of diffusers, ComfyUI or sd-scripts reads. Sample it with pipelines.generate, or train with "
            "objective diff2flow."
        )
    model = load_model(model_uri, base_uri=base_uri)
    inputs = cast(Any, model.network).config["in_channels"]
    if inputs != (own := read_json(model.base.path / "unet/config.json").get("in_channels", inputs)):
        raise ArtifactError(
            f"{model_uri!r} takes {inputs} input channels, its base {own}: it needs joined latents, which pipelines "
            "from text to image do not give. Sample it with this project."
        )
    return model


def _write_unet(model: TrainedModel, target: Path) -> list[str]:
    """Write the merged UNet and return how model_index.json names it."""
    cast(Any, model.network).save_pretrained(target, safe_serialization=True)
    config = read_json(target / "config.json")
    config.pop("_name_or_path", None)  # a local path of this machine
    if edge := model.sampling.resolution:  # the default image size of diffusers' pipelines
        config["sample_size"] = edge // model.base.pixels_per_latent
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return ["diffusers", config["_class_name"]]


def _write_scheduler(model: TrainedModel, shift: float, target: Path) -> list[str]:
    """Write the scheduler config and return how model_index.json names it.

    A model trained with the diffusion loss keeps its base's scheduler.
    """
    if model.objective == "diffusion":
        copy_part(model.base.path / "scheduler", target)
        return ["diffusers", str(model.base.scheduler_config["_class_name"])]
    cast(Any, Diff2FlowScheduler).from_config(dict(model.base.scheduler_config), shift=shift).save_pretrained(target)
    return [SCHEDULER_MODULE, Diff2FlowScheduler.__name__]


def _readme(model: TrainedModel, own_scheduler: bool, missing: Mapping[str, str]) -> str:
    sampling, arguments = model.sampling, "".join(f", {name}=None" for name in sorted(missing))
    inputs = "prompt_embeds=states, negative_prompt_embeds=empty_states" if "text_encoder" in missing else "prompt"
    lines = [
        f"# A {'Diff2Flow' if own_scheduler else 'diffusion'} model in diffusers' layout",
        "",
        "```python",
        *([f"import {SCHEDULER_MODULE}  # from the package diff2flow-ray"] if own_scheduler else []),
        "from diffusers import DiffusionPipeline",
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("this directory"{arguments})',
        f"pipeline({inputs}, num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance})",
        "```",
    ]
    if own_scheduler and sampling.solver != "euler":
        lines += ["", f"Its own solver is {sampling.solver}; the scheduler takes Euler steps, one evaluation each."]
    if missing:
        lines += ["", "Not in this directory; give these parts yourself, or the embeddings that they would make:", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in missing.items()]
    return "\n".join(lines) + "\n"


def export_diffusers(model_uri: str, target: str, *, base_uri: str | None = None) -> DiffusersExport:
    """Write a complete diffusers directory: merged UNet, the base's other parts, and the scheduler that fits.

    `import d2f_core.model.diffusers_scheduler` before `DiffusionPipeline.from_pretrained(target)`: diffusers takes a
    class from a module outside its own libraries only when the program has imported that module.

    Args:
        model_uri: the artifact, a local directory or s3:// prefix.
        target: a local directory or s3:// prefix; files of the same names are replaced, and model_index.json is written
            last.
        base_uri: the base's present location, if it has moved.

    Raises:
        ArtifactError: the model is a base model, was trained with the naive `flow_matching` loss, belongs to another
            base, or has extra input channels.
    """
    _, description = _artifact(model_uri)
    model = _load_for_others(model_uri, description, base_uri)
    shift = float(description["sampling"].get("shift", 1.0))
    storage.remove_tree(storage.join(target, MODEL_INDEX))  # without it, a half-replaced directory is not loaded
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        index, missing = copy_base_parts(model.base.path, directory)
        index["unet"] = _write_unet(model, directory / "unet")
        index["scheduler"] = _write_scheduler(model, shift, directory / "scheduler")
        own = index["scheduler"][0] == SCHEDULER_MODULE
        loading = {"import": SCHEDULER_MODULE if own else None, "scheduler": index["scheduler"][1], "missing": missing}
        merged = {**description, "method": "full", "diffusers": loading}
        write_description(directory, merged)
        (directory / "README.md").write_text(_readme(model, own, missing))
        (directory / MODEL_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        storage.upload_tree(directory, target, last=MODEL_INDEX)
    return DiffusersExport(target=target, missing=missing)


def export_peft(model_uri: str, target: str) -> str:
    """Write the PEFT adapter unchanged (adapter_config.json, adapter_model.safetensors), with diff2flow.json beside it.

    Load it with `PeftModel.from_pretrained(unet, target)` on the base's UNet; returns `target`.

    Raises:
        ArtifactError: the model is no trained artifact, or has no adapter.
    """
    directory, description = _artifact(model_uri)
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
    directory, description = _artifact(model_uri)
    adapter = _adapter(model_uri, directory, description)
    base = _load_for_others(model_uri, description, base_uri).base
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
