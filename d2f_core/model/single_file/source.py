"""What a single-file checkpoint is made of: a model's networks, tensor by tensor, and what programs are told of it.

| model                                              | network in the file    | programs are told              |
|----------------------------------------------------|------------------------|--------------------------------|
| a base; trained by the loss diffusion or diff2flow | as it is               | epsilon or v                   |
| flow_matching of `noise_minus_data`; a flow base   | as it is               | sd3, which is a rectified flow |
| flow_matching of `data_minus_noise`                | its last layer negated | sd3, which is a rectified flow |

Programs that open such a file know nothing but the family: they assume its noise schedule and the scaling of its
latents. A model with others is refused.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from d2f_core.model.artifact import DescribedModel, describe_model, load_model
from d2f_core.model.autoencoder import DEFAULT_SCALING
from d2f_core.model.base import BaseModel, local_copy, resolve_base
from d2f_core.model.base_probe import kept_reading
from d2f_core.model.denoiser import load_unet
from d2f_core.model.description import describe, read_description
from d2f_core.model.fit import is_plain
from d2f_core.model.safetensors_header import HeaderError
from d2f_core.model.single_file.family import (
    SD21,
    TEXT_MODEL,
    Family,
    Part,
    family_of_directory,
    read_config,
    read_parts,
)
from d2f_core.model.single_file.keys import LayoutError
from d2f_core.model.single_file.prediction import FLOW, Prediction
from d2f_core.model.single_file.tensor_file import TensorReader
from d2f_core.model.weight_files import shard_names
from d2f_core.objective.schedule import NoiseSchedule

STANDARD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The noise schedule that programs assume of all three families."""
ROUNDING = 1e-6
"""Largest difference of two schedules' alpha-bars that comes from rounding."""
OPENCLIP_H = (1024, 23)
"""Width of SD 2.1's text encoder, and the layers that are read: all but the last."""
OLDER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in autoencoders that were saved by early releases of diffusers."""
LAST_LAYER = ("conv_out.weight", "conv_out.bias")

Read = Callable[[str], Tensor]
"""A network's tensor by its name in `Part.shapes`."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model that the layout can hold."""

    family: Family
    parts: tuple[Part, ...]
    reads: Mapping[str, Read]
    """By the parts' directories."""
    prediction: Prediction
    description: Mapping[str, Any]
    """As in `diff2flow.json`, of the network in the file."""
    size: tuple[int, int]
    """Height and width in pixels of the model's images."""


def open_source(model_uri: str, base_uri: str | None = None, base_prediction: str = "") -> Source:
    """Check a base model or a trained one, whose LoRA is merged in memory; other weights are read when asked for.

    An unchanged base whose weights nobody has asked yet (`base_probe`) is loaded for that once.

    Args:
        base_prediction: what an unchanged base predicts, if its scheduler config says it wrongly.

    Raises:
        LayoutError: the layout, or the programs that open it, cannot hold the model; the reason and the fix.
        ArtifactError, BaseModelError: the model or its base cannot be used.
    """
    directory = local_copy(model_uri)  # first, so that the checks read this copy's contents
    model = describe_model(model_uri, base_uri=base_uri, base_prediction=base_prediction)
    base = resolve_base(model.base.uri).read_as(base_prediction or (model.base.prediction_type if model.method else ""))
    if not model.method and kept_reading(base) is None:
        load_unet(base)
    description = read_description(directory) if model.method else _description_of_base(model, base)
    trained = directory if model.method == "full" else base.path
    _check_inputs(trained, 0 if model.method == "full" else description["joined_channels"])
    family = family_of_directory(base.path)
    _check_autoencoder(base, family)
    _check_text_encoder(base, family)
    parts = tuple(read_parts(base.path, family))
    prediction, turned = _prediction(base, description)
    places = {part.directory: base.path for part in parts} | {"unet": trained}
    reads = {part.directory: _files_reader(places[part.directory] / part.directory, part) for part in parts}
    if model.method == "lora":
        reads["unet"] = load_model(model_uri, base_uri=base_uri).network.state_dict().__getitem__
    if turned:
        reads["unet"] = _turned(reads["unet"])
    if prediction.kind == FLOW:
        schedule = {"num_train_timesteps": base.schedule.num_timesteps, "prediction_type": FLOW}
        description = {**description, "prediction_type": FLOW, "schedule": schedule}
    return Source(
        family=family,
        parts=parts,
        reads=reads,
        prediction=prediction,
        description=description,
        size=model.default_size,
    )


def _description_of_base(model: DescribedModel, base: BaseModel) -> dict[str, Any]:
    return describe(base, objective=model.objective, method="full", sampling=model.sampling, training={})


def _check_inputs(directory: Path, joined: int) -> None:
    """Raise LayoutError if a directory's UNet, with `joined` more input channels, reads more than noisy latents."""
    config = read_config(directory, "unet")
    inputs, outputs = config.get("in_channels", 4) + joined, config.get("out_channels", 4)
    if inputs != outputs:
        raise LayoutError(
            f"the network takes {inputs} input channels and puts out {outputs}: it needs joined latents, which "
            "programs do not give it. Sample it with this project."
        )


def _check_autoencoder(base: BaseModel, family: Family) -> None:
    """Raise LayoutError if programs would scale the latents otherwise than the model."""
    config = {"scaling_factor": DEFAULT_SCALING, **read_config(base.path, "vae")}
    given = {"scaling_factor": family.scaling_factor, "shift_factor": None, "latents_mean": None, "latents_std": None}
    for name, assumed in given.items():
        if (value := config.get(name)) != assumed:
            raise LayoutError(
                f"the autoencoder has {name}={value}, and programs take {assumed} of every {family.title}. Export in "
                "diffusers' layout."
            )


def _check_text_encoder(base: BaseModel, family: Family) -> None:
    """Raise LayoutError if programs would stop at another layer of SD 2.1's text encoder."""
    config = read_config(base.path, "text_encoder")
    width, layers = config.get("hidden_size"), config.get("num_hidden_layers")
    if family is SD21 and width == OPENCLIP_H[0] and layers != OPENCLIP_H[1]:
        raise LayoutError(
            f"the text encoder has {layers} layers, and programs read the states after layer {OPENCLIP_H[1]} of "
            "SD 2.1's. Copy text_encoder/ of the published model."
        )


def _prediction(base: BaseModel, description: Mapping[str, Any]) -> tuple[Prediction, bool]:
    """What the network of the file predicts, and whether its last layer has to be negated for that."""
    naive = description["objective"] == "flow_matching"
    if naive or description["prediction_type"] == FLOW:
        if (steps := base.schedule.num_timesteps) != STANDARD["num_train_timesteps"]:
            raise LayoutError(
                f"the model has {steps} timesteps, and programs ask at 1000 times sigma. Train with 1000."
            )
        target = description.get("naive_target", "data_minus_noise")
        return Prediction(kind=FLOW), naive and target == "data_minus_noise"
    schedule = base.schedule
    assert isinstance(schedule, NoiseSchedule)
    zero_snr = schedule.trained_range[0] == 0
    assumed = {**STANDARD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    wanted, found = NoiseSchedule.from_scheduler_config(assumed).alphas_cumprod, schedule.alphas_cumprod
    if found.shape != wanted.shape or (found - wanted).abs().max() > ROUNDING:
        raise LayoutError(
            "the noise schedule is not Stable Diffusion's (1000 levels, scaled_linear from 0.00085 to 0.012), which "
            "programs assume. Export in diffusers' layout."
        )
    kind = description["prediction_type"]
    return Prediction(kind=kind, zero_snr=zero_snr and kind == "v_prediction"), False


def _files_reader(directory: Path, part: Part) -> Read:
    """Reads a network's tensors from its directory in diffusers' layout."""
    try:
        files = [directory / name for name in shard_names(directory, part.file)]
        if lost := [file.name for file in files if not file.is_file()]:
            raise HeaderError(f"{directory.name}/{lost[0]} is missing. Copy the weights again.")
        reader = TensorReader(files)
    except HeaderError as error:
        raise LayoutError(str(error)) from None
    names = {_present_name(name): name for name in reader.names}
    if missing := sorted(part.shapes.keys() - names.keys()):
        raise LayoutError(
            f"{directory.name}/ lacks {len(missing)} tensors that its config.json asks for, such as {missing[:2]}. "
            "Copy that directory of the original model."
        )

    def read(name: str) -> Tensor:
        tensor = reader(names[name])
        if tensor.shape != part.shapes[name]:
            raise LayoutError(
                f"{directory.name}/ has {name!r} in the shape {list(tensor.shape)}, its config.json asks for "
                f"{list(part.shapes[name])}. Copy that directory of the original model."
            )
        if not is_plain(tensor):
            raise LayoutError(
                f"{directory.name}/ has {name!r} as {tensor.dtype}, which is no weight without its scale. Copy that "
                "directory of the original model, in float16, bfloat16 or float32."
            )
        return tensor

    return read


def _present_name(name: str) -> str:
    """A saved tensor's name in its network, whichever release saved it."""
    if older := re.fullmatch(r"(.*\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", name):
        return f"{older[1]}.{OLDER_ATTENTION[older[2]]}.{older[3]}"
    return name.removeprefix(TEXT_MODEL)


def _turned(read: Read) -> Read:
    """A UNet that puts out the opposite."""
    return lambda name: -read(name) if name in LAST_LAYER else read(name)
