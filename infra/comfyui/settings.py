"""Settings of the node: what a user chose, and what the metadata of a safetensors file say."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .alignment import (
    FLOW,
    PREDICTION_TYPES,
    STABLE_DIFFUSION,
    SettingError,
    check,
    flow_times,
    rectified_times,
)

FROM_FILE, NO_FILE = "from file", "(none)"
PREDICTION_CHOICES = (FROM_FILE, *PREDICTION_TYPES)
SCHEDULES = {
    "scaled_linear": STABLE_DIFFUSION,
    "scaled_linear, zero terminal SNR": {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True},
}
"""Schedules by the name that a user chooses."""
SCHEDULE_CHOICES = (FROM_FILE, *SCHEDULES)
MOST_HEADER_BYTES = 100_000_000
MOST_TIMESTEPS = 100_000
SIMPLE, BETA = "simple", "beta"
"""ComfyUI's schedulers that take the times of this project's grids."""


@dataclass(frozen=True)
class Settings:
    """How a model is sampled."""

    prediction_type: str
    times: Tensor
    """Float64 [T]: flow time of each timestep of the network."""
    shift: float
    advice: str
    """Settings for the sampler node, as text."""


def read_metadata(path: str) -> dict[str, str]:
    """The metadata in a safetensors header.

    Raises:
        SettingError: the file has another format.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(MOST_HEADER_BYTES, os.path.getsize(path) - 8):
            raise SettingError(f"{os.path.basename(path)} is no safetensors file. Choose the settings by hand.")
        header = file.read(size)
    try:
        metadata = json.loads(header).get("__metadata__", {})
        return {name: value for name, value in metadata.items() if isinstance(value, str)}
    except (ValueError, AttributeError) as error:
        name = os.path.basename(path)
        raise SettingError(f"{name} has a broken header ({error}). Choose the settings by hand.") from error


def _from_file(metadata: Mapping[str, str], key: str, setting: str, file: str) -> str:
    if key in metadata:
        return metadata[key]
    reason = "no file is chosen" if file == NO_FILE else f"the file {file!r} has no metadata {key}"
    raise SettingError(
        f"{setting}='{FROM_FILE}', but {reason}. Choose {setting} by hand, or a file exported by Diff2Flow."
    )


def _prediction_type(choice: str, metadata: Mapping[str, str], file: str) -> str:
    if choice != FROM_FILE:
        return choice
    if metadata.get("d2f_objective") == "flow_matching":
        return FLOW  # trained by the naive loss: its network is one of rectified flow, whatever its base was
    kind = _from_file(metadata, "d2f_prediction_type", "prediction_type", file)
    return FLOW if kind == "flow_prediction" else kind


def _schedule_of(metadata: Mapping[str, str], file: str) -> Mapping[str, Any]:
    """The noise schedule that a file's metadata name."""
    text = _from_file(metadata, "d2f_schedule", "schedule", file)
    try:
        schedule = json.loads(text)
        fits = 2 <= int(schedule.get("num_train_timesteps") or 1000) <= MOST_TIMESTEPS
    except (ValueError, TypeError, AttributeError) as error:
        raise SettingError(f"d2f_schedule of {file!r} cannot be read ({error}). Choose schedule by hand.") from error
    if not fits:
        raise SettingError(f"d2f_schedule of {file!r} must have 2 to {MOST_TIMESTEPS} steps. Choose schedule by hand.")
    return schedule


def _schedule(choice: str, metadata: Mapping[str, str], file: str) -> Mapping[str, Any]:
    if choice in SCHEDULES:
        return SCHEDULES[choice]
    if choice != FROM_FILE:
        raise SettingError(f"schedule={choice!r} is not known. Use one of {', '.join(SCHEDULE_CHOICES)}.")
    return _schedule_of(metadata, file)


def _times(kind: str, choice: str, metadata: Mapping[str, str], file: str) -> Tensor:
    if kind != FLOW:
        return flow_times(_schedule(choice, metadata, file))
    # Rectified flow has no schedule of noise; a file may still say how many timesteps its network counts.
    schedule = _schedule_of(metadata, file) if "d2f_schedule" in metadata else {}
    return rectified_times(int(schedule.get("num_train_timesteps") or 1000))


def _shift(given: float, metadata: Mapping[str, str], file: str) -> float:
    try:
        shift = given or float(metadata.get("d2f_shift", "1"))
    except ValueError as error:
        raise SettingError(f"d2f_shift of {file!r} is no number ({error}). Give a shift by hand.") from error
    if not 0 < shift < math.inf:
        raise SettingError(f"shift={shift} must be a number above 0, or 0 for the file's. 1 keeps the steps equal.")
    return shift


def _advice(metadata: Mapping[str, str], shift: float) -> str:
    scheduler = BETA if metadata.get("d2f_time_grid") == "beta" else SIMPLE
    known = {"steps": metadata.get("d2f_steps"), "cfg": metadata.get("d2f_guidance")}
    numbers = "".join(f", {name} {value}" for name, value in known.items() if value)
    return f"sampler euler, scheduler {scheduler}{numbers}, shift {shift:g}"


def settings(prediction_type: str, schedule: str, shift: float, file: str, metadata: Mapping[str, str]) -> Settings:
    """Complete settings from the node's inputs and the file's metadata.

    Args:
        prediction_type, schedule: one of the choices.
        shift: 0 takes the file's, and 1 where there is none.
        file: its name, for messages.

    Raises:
        SettingError: a setting is to come from a file that does not have it, or has a value that cannot be used.
    """
    kind = _prediction_type(prediction_type, metadata, file)
    times = _times(kind, schedule, metadata, file)
    check(kind, times)
    chosen = _shift(shift, metadata, file)
    return Settings(prediction_type=kind, times=times, shift=chosen, advice=_advice(metadata, chosen))
