"""`diff2flow.json`: what a trained model is, how to sample it, and the hashes of everything that it depends on."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dacite

from d2f_core.hashing import HASHED_SUFFIXES, file_sha256
from d2f_core.identity import identity_values
from d2f_core.model.artifact_files import ArtifactError, check_files
from d2f_core.model.base import BaseModel, schedule_hash
from d2f_core.model.caption_rules import DEFAULT, CaptionRules, written_rules
from d2f_core.model.config import SamplingDefaults, TaskName
from d2f_core.objective.schedule import FLOW_PREDICTION
from d2f_core.objective.time_sampling import NaiveTarget
from d2f_core.retry import one_line

DESCRIPTION = "diff2flow.json"
FORMAT_VERSION = 3
"""Newest format, which adds how captions are read. Formats 1 and 2, which older releases read too, are written wherever
they say all."""
NAIVE_TARGET_VERSION = 2
"""First format that says what a naively trained network puts out; also the first of flow bases and time grids."""
WEIGHTS = {"full": "unet", "lora": "adapter"}
"""Training method -> directory of the trained weights."""
MAX_JOINED_CHANNELS = 64
OLDER = {"task": "text_to_image", "joined_channels": 0, "naive_target": "data_minus_noise"}
"""Values of fields that are missing in older descriptions."""
STRICT = dacite.Config(strict=True, cast=[float])


@dataclass(frozen=True, kw_only=True)
class _BaseReference:
    uri: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Description:
    """Fields and types of `diff2flow.json`."""

    format_version: int
    objective: Literal["diff2flow", "flow_matching", "diffusion"]
    naive_target: NaiveTarget
    """What a network of the objective flow_matching puts out."""
    method: Literal["full", "lora"]
    task: TaskName
    joined_channels: int
    """Input channels for an image's latents, in addition to the base's own."""
    base: _BaseReference
    prediction_type: str
    schedule: dict[str, Any]
    schedule_sha256: str
    time_convention: Literal["t=0 noise, t=1 data"]
    sampling: SamplingDefaults
    training: dict[str, Any]
    weights_sha256: dict[str, str]
    captions: CaptionRules = DEFAULT
    """How captions are read."""
    diffusers: dict[str, Any] | None = None
    """How diffusers loads the directory, if it is an export."""

    def __post_init__(self) -> None:
        joins = self.task == "image_to_depth"
        if not (0 < self.joined_channels <= MAX_JOINED_CHANNELS if joins else self.joined_channels == 0):
            raise ValueError(
                f"joined_channels={self.joined_channels} with task={self.task!r}: it must be "
                f"{f'1 to {MAX_JOINED_CHANNELS}' if joins else 0}"
            )


def describe(
    base: BaseModel,
    *,
    objective: str,
    method: str,
    sampling: SamplingDefaults,
    training: Mapping[str, Any],
    task: TaskName = "text_to_image",
    joined_channels: int = 0,
    naive_target: NaiveTarget = "noise_minus_data",
    captions: CaptionRules = DEFAULT,
) -> dict[str, Any]:
    """The contents of `diff2flow.json`, without the weights' hashes."""
    naive = objective == "flow_matching" and naive_target != OLDER["naive_target"]
    sampled = identity_values(sampling)  # a time grid only if it is not the one of format 1
    newer = naive or base.prediction_type == FLOW_PREDICTION or "time_grid" in sampled
    rules = written_rules(captions)
    return {
        "format_version": FORMAT_VERSION if rules else NAIVE_TARGET_VERSION if newer else 1,
        "objective": objective,
        **({"naive_target": naive_target} if naive else {}),
        "method": method,
        "task": task,
        "joined_channels": joined_channels,
        "base": {"uri": base.uri, "sha256": base.read_hash},
        "prediction_type": base.prediction_type,
        "schedule": dict(base.scheduler_config),
        "schedule_sha256": schedule_hash(base.scheduler_config),
        "time_convention": "t=0 noise, t=1 data",
        "sampling": sampled,
        **rules,
        "training": dict(training),
    }


def weights_hashes(directory: Path, method: str, sha256: Callable[[Path], str] = file_sha256) -> dict[str, str]:
    """Relative name -> sha256 for the weight files and the configs that determine how they are used.

    Args:
        sha256: of a file's contents.
    """
    files = sorted((directory / WEIGHTS[method]).glob("*"))
    return {
        file.relative_to(directory).as_posix(): sha256(file)
        for file in files
        if file.is_file() and file.suffix in HASHED_SUFFIXES
    }


def write_description(directory: Path, description: Mapping[str, Any]) -> None:
    """Write `diff2flow.json`, with the hashes of the weights, which must already be in the directory."""
    complete = {**description, "weights_sha256": weights_hashes(directory, description["method"])}
    if complete.get("format_version") == 1:
        complete.pop("naive_target", None)  # releases that read format 1 alone do not know it
    (directory / DESCRIPTION).write_text(json.dumps(complete, indent=2, sort_keys=True) + "\n")


def read_description(directory: Path) -> dict[str, Any]:
    """Read and check `diff2flow.json`, after the directory's files were checked.

    Raises:
        ArtifactError: a file that does not belong in an artifact, an unknown format, or a field that is missing or has
            the wrong type.
    """
    check_files(directory)
    description = json.loads((directory / DESCRIPTION).read_text())
    if description.get("format_version") not in range(1, FORMAT_VERSION + 1):
        raise ArtifactError(
            f"{str(directory)!r} has format_version={description.get('format_version')!r}; this release reads 1 to "
            f"{FORMAT_VERSION}. Use the release that wrote it, or train again."
        )
    description = {**OLDER, **description}
    try:
        dacite.from_dict(_Description, description, STRICT)
    except (dacite.DaciteError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{str(directory / DESCRIPTION)!r}: {one_line(error)}. Export the model again with this release."
        ) from None
    return description


def read_sampling(description: Mapping[str, Any]) -> SamplingDefaults:
    """The sampling settings in a checked description."""
    return dacite.from_dict(SamplingDefaults, description["sampling"], STRICT)
