"""A trained model as files: its weights, the base they belong to, and how to sample it.

    diff2flow.json            the description below
    unet/                     full finetuning: a diffusers UNet
    adapter/                  LoRA: PEFT's adapter_config.json and adapter_model.safetensors

A model card (README.md), samples.png and the training's config.yaml may lie beside them. Safetensors and JSON only:
nothing in an artifact can run code, and `artifact_files.check_files` refuses a directory with any other file.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from d2f_core.file_systems import read_or_map
from d2f_core.model.artifact_files import ArtifactError
from d2f_core.model.artifact_writer import save_artifact, upload_artifact
from d2f_core.model.base import (
    BaseModel,
    BaseModelError,
    describe_base,
    described_copy,
    local_copy,
    resolve_base,
    schedule_hash,
)
from d2f_core.model.caption_rules import read_rules
from d2f_core.model.config import SamplingDefaults
from d2f_core.model.denoiser import (
    check_unet,
    extend_input_channels,
    load_unet,
    unet_on_meta,
)
from d2f_core.model.description import (
    DESCRIPTION,
    WEIGHTS,
    describe,
    read_description,
    read_sampling,
    weights_hashes,
)
from d2f_core.model.fit import diffusers_misfit
from d2f_core.model.lora import describe_lora, load_lora
from d2f_core.model.model_files import ModelFiles
from d2f_core.model.named_base import require_allowed
from d2f_core.model.trained_model import DescribedModel, TrainedModel
from d2f_core.objective.schedule import flow_shift, prediction_type_of, read_schedule
from d2f_core.retry import one_line

__all__ = [
    "DESCRIPTION",
    "ArtifactError",
    "DescribedModel",
    "TrainedModel",
    "describe",
    "describe_model",
    "load_model",
    "load_weights",
    "read_description",
    "save_artifact",
    "to_uint8",
    "upload_artifact",
]


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy trained weights, by parameter name, into a network built as it was for the training.

    Raises:
        ArtifactError: a weight has no parameter in the network, or a trained parameter has no weight.
    """
    unknown = network.load_state_dict(dict(weights), strict=False).unexpected_keys
    missing = [name for name, p in network.named_parameters() if p.requires_grad and name not in weights]
    if unknown or missing:
        raise ArtifactError(
            f"the weights do not fit the network: unknown {unknown[:3]}, missing {missing[:3]}. "
            "Use the model config that they were trained with."
        )


def load_model(uri: str, *, base_uri: str | None = None, base_prediction: str = "") -> TrainedModel:
    """Load a base model (sampled by DDIM, a flow model by Euler) or a trained artifact, by local directory or s3://
    prefix. An exported diffusers directory needs no base: autoencoder and text encoder are its own.

    Args:
        base_uri: the base's present location, if it has moved; its hash must equal that of the base trained on.
        base_prediction: what an unchanged base predicts, if its scheduler config says it wrongly. A trained artifact
            says it itself.

    Raises:
        ArtifactError: a file that does not belong in an artifact, an unknown format, or a hash (of the base, the
            schedule or the weights) that differs from the description's.
        BaseModelError: `uri` holds neither an artifact nor a base model.
    """
    files = ModelFiles(path=local_copy(uri))
    described, description = _described(uri, files, base_uri, resolve_base, base_prediction)
    network = _network(uri, files, described, description, _load) if description else load_unet(described.base)
    values = {field.name: getattr(described, field.name) for field in fields(described)}
    return TrainedModel(**values, network=network.eval().requires_grad_(False))


def describe_model(uri: str, *, base_uri: str | None = None, base_prediction: str = "") -> DescribedModel:
    """Check a model as `load_model` does, for a machine that loads no weights: they are compared with the network by
    the headers of their files; hashes are taken in pieces. Of a model on S3, only headers and configs are copied.

    Raises:
        the errors of `load_model`.
    """
    files = described_copy(uri)
    described, description = _described(uri, files, base_uri, describe_base, base_prediction)
    if description:
        _network(uri, files, described, description, _describe)
    else:
        check_unet(described.base)
    return described


def _described(
    uri: str, files: ModelFiles, base_uri: str | None, find_base: Callable[[str], BaseModel], base_prediction: str
) -> tuple[DescribedModel, Mapping[str, Any]]:
    """A model whose files were checked, and its description, which a base model has none of."""
    if not os.path.lexists(files.path / DESCRIPTION):
        return _base_as_model(find_base(uri).read_as(base_prediction)), {}
    description = read_description(files.path)
    if base_prediction:
        raise ArtifactError(
            f"{uri!r} is a trained model, which says itself that its base is read as {description['prediction_type']}; "
            f"base_prediction={base_prediction!r} is for unchanged bases. Leave it out."
        )
    _check_weights(uri, files, description)
    if base_uri:
        base = find_base(base_uri)
    elif not _is_export(description):
        require_allowed(description["base"]["uri"], uri)
        base = find_base(description["base"]["uri"])
    else:
        base = _copied_base(find_base(uri), description)
    base = _fitting_base(uri, base, description).read_captions(read_rules(description))
    described = DescribedModel(
        base=base,
        objective=description["objective"],
        naive_target=description["naive_target"],
        sampling=read_sampling(description),
        task=description["task"],
        method=description["method"],
        own_hash=files.hash(),
    )
    return described, description


def _is_export(description: Mapping[str, Any]) -> bool:
    """Whether a described model is an exported diffusers directory, which holds its base's other parts."""
    return description["method"] == "full" and description.get("diffusers") is not None


def _copied_base(export: BaseModel, description: Mapping[str, Any]) -> BaseModel:
    """The base whose parts an export holds, with the schedule that the description says: in scheduler/ is the one that
    samples the export. The description tells no hashes of the copied parts, so these are taken as they are.
    """
    schedule = description["schedule"]
    read_schedule(schedule)  # an unusable one is refused here, not while sampling
    return replace(
        export,
        scheduler_config=schedule,
        prediction_type=prediction_type_of(schedule),
        original_hash=description["base"]["sha256"],
    )


def _base_as_model(base: BaseModel) -> DescribedModel:
    """An unchanged base: a diffusion model is sampled by DDIM, a flow model as its scheduler config says."""
    if not base.is_flow:
        return DescribedModel(base=base, objective="diffusion", sampling=SamplingDefaults(solver="ddim", steps=25))
    sampling = SamplingDefaults(steps=25, shift=flow_shift(base.scheduler_config))
    return DescribedModel(base=base, objective="diff2flow", sampling=sampling)


def _check_weights(uri: str, files: ModelFiles, description: Mapping[str, Any]) -> None:
    expected = description["weights_sha256"]
    found = weights_hashes(files.path, description["method"], files.sha256)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ArtifactError(
                f"{uri!r}: {name!r} has sha256 {found.get(name, 'none: it is missing')}, but {DESCRIPTION} says "
                f"{expected.get(name, 'nothing of it')}. Copy the artifact again."
            )
    if not any(name.endswith(".safetensors") for name in found):
        raise ArtifactError(f"{uri!r} has no weights in {WEIGHTS[description['method']]}/. Copy the artifact again.")


def _fitting_base(uri: str, base: BaseModel, description: Mapping[str, Any]) -> BaseModel:
    """The base, read as the model was trained on it; raises ArtifactError if it is another."""
    if not base.has_hash(description["base"]["sha256"]):
        raise ArtifactError(
            f"{uri!r} was trained on a base with sha256 {description['base']['sha256']}, but {base.uri!r} has "
            f"{base.content_hash}. Give the original base."
        )
    base = base.read_as(description["prediction_type"])
    hashes = {
        "schedule_sha256": description["schedule_sha256"],
        "its own schedule": schedule_hash(description["schedule"]),
        "the base's schedule": schedule_hash(base.scheduler_config),
    }
    if len(set(hashes.values())) > 1 or description["prediction_type"] != base.prediction_type:
        raise ArtifactError(
            f"{uri!r} does not fit the noise schedule of {base.uri!r}: {hashes}, prediction type "
            f"{description['prediction_type']!r} and {base.prediction_type!r}. Copy the artifact again."
        )
    return base


def _network(
    uri: str,
    files: ModelFiles,
    model: DescribedModel,
    description: Mapping[str, Any],
    make: Callable[[DescribedModel, Path, int], nn.Module],
) -> nn.Module:
    """Make the described network of the checked files; raises ArtifactError when a library cannot.

    Args:
        make: makes it, given the directory of the trained weights and how many input channels it has beside the base's.
    """
    extra, part = description["joined_channels"], WEIGHTS[model.method]
    try:
        network = make(model, files.path / part, extra)
    except BaseModelError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"{uri!r}: no network can be made of {part}/ ({one_line(error)}). Copy the artifact again."
        ) from error
    inputs, wanted = (int(cast(Any, network).config[f"{end}_channels"]) for end in ("in", "out"))
    if extra and inputs != wanted + extra:  # a description without extra channels may be older than this field
        raise ArtifactError(
            f"{uri!r}: the network has {inputs} input channels, but task={model.task!r} with joined_channels="
            f"{extra} needs {wanted + extra}. Copy the artifact again."
        )
    return network


def _load(model: DescribedModel, directory: Path, extra: int) -> nn.Module:
    if model.method == "lora":
        unet = load_unet(model.base, probe=False)  # whoever trained on it has asked it
        return load_lora(extend_input_channels(unet, extra) if extra else unet, directory)
    _describe_whole_unet(directory)
    return UNet2DConditionModel.from_pretrained(directory, use_safetensors=True, **read_or_map(directory))


def _describe(model: DescribedModel, directory: Path, extra: int) -> nn.Module:
    """The network of `_load` on torch's meta device."""
    if model.method != "lora":
        return _describe_whole_unet(directory)
    unet = check_unet(model.base)
    with torch.device("meta"):
        return describe_lora(extend_input_channels(unet, extra) if extra else unet, directory)


def _describe_whole_unet(directory: Path) -> nn.Module:
    """A UNet on torch's meta device, after a check that its files hold all its weights and no others."""
    unet = unet_on_meta(directory)
    if misfit := diffusers_misfit(unet, directory):
        raise ValueError(str(misfit))
    return unet


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels [batch, 3, H, W] in [-1, 1] as uint8 [batch, H, W, 3]."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
