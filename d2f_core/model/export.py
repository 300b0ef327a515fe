"""A trained artifact as a diffusers directory. `d2f_core.model.export_adapter` has the layouts of adapters.

| function                  | read by                                  | weights       | how to sample it is told by |
|---------------------------|------------------------------------------|---------------|-----------------------------|
| `export_diffusers`        | `DiffusionPipeline.from_pretrained`      | a merged UNet | the scheduler and README.md |
| `export_peft`             | `PeftModel.from_pretrained`              | the adapter   | diff2flow.json              |
| `export_single_file_lora` | ComfyUI, sd-scripts, `load_lora_weights` | the adapter   | the file's metadata         |

An exported diffusers directory is still an artifact that `load_model` reads, without the base. Nothing exported can run
code: safetensors, JSON and vocabularies only.
"""

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DPMSolverMultistepScheduler

from d2f_core import storage
from d2f_core.model.artifact import DESCRIPTION, ArtifactError, TrainedModel, load_model, read_description
from d2f_core.model.artifact_files import PARTS
from d2f_core.model.autoencoder import latent_scale
from d2f_core.model.base import local_copy
from d2f_core.model.description import NAIVE_TARGET_VERSION, write_description
from d2f_core.model.diffusers_layout import MODEL_INDEX, copy_base_parts, read_json
from d2f_core.model.diffusers_scheduler import Diff2FlowScheduler
from d2f_core.model.export_readme import readme
from d2f_core.model.peft_layout import public_name
from d2f_core.model.sampling import SCHEDULERS
from d2f_core.objective.schedule import FLOW_PREDICTION

SCHEDULER_MODULE = Diff2FlowScheduler.__module__
SCHEDULER_CONFIG = Diff2FlowScheduler.config_name
MARKS = (f"scheduler/{SCHEDULER_CONFIG}", MODEL_INDEX)
"""Files without which neither this project nor diffusers opens a directory."""
EULER = {
    "prediction_type": FLOW_PREDICTION,
    "use_flow_sigmas": True,
    "solver_order": 1,
    "algorithm_type": "dpmsolver++",
    "final_sigmas_type": "zero",
}
"""Settings by which diffusers' DPM-Solver takes Euler steps along the flow; its own flow scheduler is not one that
pipelines of Stable Diffusion can use."""


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
    """The model with its adapter merged, checked to be one that pipelines from text to image can sample."""
    model = load_model(model_uri, base_uri=base_uri)
    inputs = cast(Any, model.network).config["in_channels"]
    if inputs != (own := read_json(model.base.path / "unet/config.json").get("in_channels", inputs)):
        raise ArtifactError(
            f"{model_uri!r} takes {inputs} input channels, its base {own}: it needs joined latents, which pipelines "
            "from text to image do not give. Sample it with this project."
        )
    return model


def _refuse_own_place(target: str, *sources: str) -> None:
    """Refuse to write into a directory that is read for the export, or over one in a part that is emptied."""
    here = f"{_place(target)}/"
    for there in (f"{_place(source)}/" for source in sources):
        if here.startswith(there) or (there.startswith(here) and PARTS.fullmatch(there[len(here) :].split("/")[0])):
            raise ArtifactError(
                f"{target!r} overlaps {there[:-1]!r}, which is read for this export. Give a directory of its own."
            )


def _place(uri: str) -> str:
    """The URI in one spelling."""
    return uri.rstrip("/") if storage.is_s3(uri) else str(Path(uri.removeprefix("file://")).expanduser().resolve())


def _turn_round(model: TrainedModel) -> bool:
    """Make a network that puts out data - noise put out noise - data, as other programs expect; True if it did."""
    if model.objective != "flow_matching" or model.naive_target == "noise_minus_data":
        return False
    with torch.no_grad():
        for parameter in cast(Any, model.network).conv_out.parameters():
            parameter.neg_()
    return True


def _write_unet(model: TrainedModel, target: Path, dtype: torch.dtype) -> list[str]:
    """Write the merged UNet and return how model_index.json names it."""
    network = cast(Any, torch.nn.Module.to(model.network, dtype))  # its own `to` warns of layers that it has none of
    if odd := [name for name, tensor in network.state_dict().items() if not bool(tensor.isfinite().all())]:
        raise ArtifactError(f"{odd[0]!r} and {len(odd) - 1} more are not finite in {dtype}. Use bfloat16 or float32.")
    network.save_pretrained(target, safe_serialization=True)
    config = read_json(target / "config.json")
    config.pop("_name_or_path", None)  # a local path of this machine
    if edge := model.sampling.resolution:  # the default image size of diffusers' pipelines
        config["sample_size"] = edge // model.base.pixels_per_latent
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return ["diffusers", config["_class_name"]]


def _write_scheduler(model: TrainedModel, target: Path) -> list[str]:
    """Write the config of the scheduler that samples as the model's own settings say, and return how model_index.json
    names it.
    """
    config, shift = dict(model.base.scheduler_config), model.sampling.shift
    if model.puts_out_velocity:
        steps = model.schedule.num_timesteps
        scheduler: Any = DPMSolverMultistepScheduler(num_train_timesteps=steps, flow_shift=shift, **EULER)
    elif model.sampling.solver in SCHEDULERS:
        kind, settings = SCHEDULERS[model.sampling.solver]
        scheduler = kind.from_config(config, timestep_spacing="trailing", **settings)
    else:
        grid = model.sampling.time_grid
        scheduler = cast(Any, Diff2FlowScheduler).from_config(config, shift=shift, time_grid=grid)
    target.mkdir()
    written = json.loads(scheduler.to_json_string())
    if not math.isfinite(written.get("lambda_min_clipped", 0)):  # DPM-Solver's default, which is not plain JSON
        del written["lambda_min_clipped"]
    (target / SCHEDULER_CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    own = isinstance(scheduler, Diff2FlowScheduler)
    return [SCHEDULER_MODULE if own else "diffusers", type(scheduler).__name__]


def export_diffusers(
    model_uri: str, target: str, *, base_uri: str | None = None, dtype: torch.dtype = torch.float32
) -> DiffusersExport:
    """Write a complete diffusers directory: merged UNet, the base's other parts, and the scheduler that fits.

    `import d2f_core.model.diffusers_scheduler` before `DiffusionPipeline.from_pretrained(target)`: diffusers takes a
    class from a module outside its own libraries only when the program has imported that module. Rectified-flow models
    (the naive `flow_matching` loss, or a base that is one) and models that are sampled by DDIM or DPM-Solver++ need no
    import.

    Args:
        model_uri: the artifact, a local directory or s3:// prefix.
        target: a local directory or s3:// prefix. The parts that are written are emptied first. Until the last files
            are written, neither diffusers nor `load_model` without a base opens it.
        base_uri: the base's present location, if it has moved.
        dtype: of the UNet's weights; the other parts are copied as they are.

    Raises:
        ArtifactError: the model is a base model, belongs to another base, has extra input channels or weights that
            `dtype` cannot hold, or the target is where it or its base is.
    """
    source, description = artifact(model_uri)
    _refuse_own_place(target, model_uri, str(source))
    model = load_for_others(model_uri, description, base_uri)
    _refuse_own_place(target, str(model.base.path), *([model.base.uri] if storage.is_s3(model.base.uri) else []))
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        index, missing = copy_base_parts(model.base.path, directory)
        _check_scaling(model, index["_class_name"])
        version = max(NAIVE_TARGET_VERSION, description["format_version"])
        turned = {"naive_target": "noise_minus_data", "format_version": version} if _turn_round(model) else {}
        index["unet"] = _write_unet(model, directory / "unet", dtype)
        index["scheduler"] = _write_scheduler(model, directory / "scheduler")
        own = index["scheduler"][0] == SCHEDULER_MODULE
        loading = {"import": SCHEDULER_MODULE if own else None, "scheduler": index["scheduler"][1], "missing": missing}
        base = {**description["base"], "uri": public_name(description["base"]["uri"])}
        write_description(directory, {**description, **turned, "method": "full", "base": base, "diffusers": loading})
        (directory / "README.md").write_text(readme(model, base, loading))
        (directory / MODEL_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        _replace(directory, target)
    return DiffusersExport(target=target, missing=missing)


def _check_scaling(model: TrainedModel, pipeline: str) -> None:
    """Raise ArtifactError when a pipeline of diffusers would decode latents otherwise than the autoencoder asks for."""
    if not (model.base.path / "vae/config.json").is_file():
        return
    scale = latent_scale(model.base)
    applied = {"shift_factor": False, "latents_mean and latents_std": "StableDiffusionXL" in pipeline}
    asked = {"shift_factor": bool(scale.mean and not scale.std), "latents_mean and latents_std": bool(scale.std)}
    if ignored := [name for name in asked if asked[name] and not applied[name]]:
        raise ArtifactError(
            f"the autoencoder of {model.base.uri!r} has {ignored[0]}, and {pipeline} decodes latents without them. "
            "Sample it with this project."
        )


def _replace(directory: Path, target: str) -> None:
    """Put the export in place of what an earlier one left: its shards, indices and variants would be loaded instead."""
    for name in (*MARKS, DESCRIPTION):  # first, so that a half-replaced directory is not loaded
        storage.remove_tree(storage.join(target, name))
    for part in sorted(path.name for path in directory.iterdir() if path.is_dir()):
        storage.remove_tree(storage.join(target, part))
    marks = {name: (directory / name).read_bytes() for name in MARKS}
    for name in MARKS:
        (directory / name).unlink()
    storage.upload_tree(directory, target)
    for name, content in marks.items():
        storage.write_bytes(storage.join(target, name), content)
