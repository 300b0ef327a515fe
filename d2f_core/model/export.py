"""A trained artifact as a diffusers directory. `d2f_core.model.export_adapter` has the layouts of adapters.

| function                  | read by                                  | weights       | how to sample it is told by |
|---------------------------|------------------------------------------|---------------|-----------------------------|
| `export_diffusers`        | `DiffusionPipeline.from_pretrained`      | a merged UNet | the scheduler and README.md |
| `export_peft`             | `PeftModel.from_pretrained`              | the adapter   | diff2flow.json              |
| `export_single_file_lora` | ComfyUI, sd-scripts, `load_lora_weights` | the adapter   | the file's metadata         |

An exported diffusers directory is still an artifact that `load_model` reads. Nothing exported can run code:
safetensors, JSON and vocabularies only.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from d2f_core import storage
from d2f_core.model.artifact import DESCRIPTION, ArtifactError, TrainedModel, load_model, read_description
from d2f_core.model.base import local_copy
from d2f_core.model.description import write_description
from d2f_core.model.diffusers_layout import MODEL_INDEX, copy_base_parts, copy_part, read_json
from d2f_core.model.diffusers_scheduler import Diff2FlowScheduler

SCHEDULER_MODULE = Diff2FlowScheduler.__module__


@dataclass(frozen=True, kw_only=True)
class DiffusersExport:
    """The exported directory, and the parts that a user has to add."""

    target: str
    missing: Mapping[str, str]
    """Missing part of the pipeline -> reason. Pass these to `from_pretrained` by name, as objects or None."""


def artifact(model_uri: str) -> tuple[Path, dict[str, Any]]:
    """The artifact's local directory and its description."""
    directory = local_copy(model_uri)
    if not (directory / DESCRIPTION).is_file():
        raise ArtifactError(
            f"{model_uri!r} has no {DESCRIPTION}: it is a base model, and nothing of it was trained. Give the output "
            "of a finetuning."
        )
    return directory, read_description(directory)


def load_for_others(model_uri: str, description: Mapping[str, Any], base_uri: str | None) -> TrainedModel:
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
    _, description = artifact(model_uri)
    model = load_for_others(model_uri, description, base_uri)
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
