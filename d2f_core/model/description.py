"""`diff2flow.json`: what a trained model is, how to sample it, and the hashes of all that it depends on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import dacite

from d2f_core.hashing import HASHED_SUFFIXES, file_sha256
from d2f_core.model.artifact_files import ArtifactError, check_files
from d2f_core.model.base import BaseModel
from d2f_core.model.config import SamplingDefaults, TaskName
from d2f_core.retry import one_line

DESCRIPTION = "diff2flow.json"
FORMAT_VERSION = 1
WEIGHTS = {"full": "unet", "lora": "adapter"}
"""Method -> the directory of the trained weights."""
MAX_JOINED_CHANNELS = 64
OLDER = {"task": "text_to_image", "joined_channels": 0}
"""What a description means that was written before these fields were."""
STRICT = dacite.Config(strict=True, cast=[float])


@dataclass(frozen=True, kw_only=True)
class _BaseReference:
    uri: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Description:
    """The fields of `diff2flow.json`, to check their types by."""

    format_version: int
    objective: Literal["diff2flow", "flow_matching", "diffusion"]
    method: Literal["full", "lora"]
    task: TaskName
    joined_channels: int
    """Input channels of the network for the latents of an image, beside the base's own."""
    base: _BaseReference
    prediction_type: str
    schedule: dict[str, Any]
    schedule_sha256: str
    time_convention: Literal["t=0 noise, t=1 data"]
    sampling: SamplingDefaults
    training: dict[str, Any]
    weights_sha256: dict[str, str]
    diffusers: dict[str, Any] | None = None
    """How an exported directory is loaded by diffusers."""

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
) -> dict[str, Any]:
    """The contents of `diff2flow.json`, but for the weights' hashes."""
    return {
        "format_version": FORMAT_VERSION,
        "objective": objective,
        "method": method,
        "task": task,
        "joined_channels": joined_channels,
        "base": {"uri": base.uri, "sha256": base.content_hash},
        "prediction_type": base.prediction_type,
        "schedule": dict(base.scheduler_config),
        "schedule_sha256": schedule_hash(base.scheduler_config),
        "time_convention": "t=0 noise, t=1 data",
        "sampling": asdict(sampling),
        "training": dict(training),
    }


def schedule_hash(scheduler_config: Mapping[str, Any]) -> str:
    """sha256 of a scheduler config, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(dict(scheduler_config), sort_keys=True).encode()).hexdigest()


def weights_hashes(directory: Path, method: str) -> dict[str, str]:
    """Relative name -> sha256 of the trained weights and of the configs that decide how they compute."""
    files = sorted((directory / WEIGHTS[method]).glob("*"))
    return {
        file.relative_to(directory).as_posix(): file_sha256(file)
        for file in files
        if file.is_file() and file.suffix in HASHED_SUFFIXES
    }


def write_description(directory: Path, description: Mapping[str, Any]) -> None:
    """Write `diff2flow.json` beside weights that are in place, with their hashes."""
    complete = {**description, "weights_sha256": weights_hashes(directory, description["method"])}
    (directory / DESCRIPTION).write_text(json.dumps(complete, indent=2, sort_keys=True) + "\n")


def read_description(directory: Path) -> dict[str, Any]:
    """Read and check `diff2flow.json`, after the directory's files were checked.

    Raises:
        ArtifactError: a file that no artifact has, another format, or a field that is missing or of another kind.
    """
    check_files(directory)
    description = json.loads((directory / DESCRIPTION).read_text())
    if description.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{str(directory)!r} has format_version={description.get('format_version')!r}; this release reads "
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
    """How a checked description says to sample."""
    return dacite.from_dict(SamplingDefaults, description["sampling"], STRICT)
