"""The timesteps of one sampling run, and which step a pipeline means by one of them."""

import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 0.5
"""Largest rounding of a timestep by a pipeline that still counts as the same timestep."""


class SchedulerUseError(ValueError):
    """A method was called out of order, or with a timestep that is not the run's next one."""


def whole_number(name: str, value: Any, advice: str) -> int:
    """The value of an argument that counts something, as numpy's integers do too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise SchedulerUseError(f"{name}={value!r} must be a whole number. {advice}")
    return int(value)


@dataclass(frozen=True)
class RunTimesteps:
    """Timesteps as a run's flow times have them, and as pipelines get them."""

    aligned: list[float]
    """The network's timestep at each flow time; equal ones below and above the trained range."""
    given: list[float]
    """The same in float32, but falling strictly: equal ones are raised by float32's spacing each, which a network does
    not notice, so that every timestep tells the step of the run to a pipeline that starts late."""

    @classmethod
    def of(cls, aligned: Tensor, num_train_timesteps: int) -> "RunTimesteps":
        """Timesteps [steps] of a network that was trained at `num_train_timesteps`."""
        spacing, falling = num_train_timesteps * torch.finfo(torch.float32).eps, aligned.tolist()
        for step in reversed(range(len(falling) - 1)):
            falling[step] = max(falling[step], falling[step + 1] + spacing)
        return cls(aligned.tolist(), torch.tensor(falling, dtype=torch.float32).tolist())

    def step_of(self, timestep: float, present: int | None = None) -> int | None:
        """The step with this timestep; None if there is none.

        Args:
            timestep: as `given`, or rounded; a whole number (int) always counts as rounded.
            present: the run's next step, if it is known; preferred to others with the same rounded timestep.
        """
        if isinstance(timestep, float) and timestep in self.given:
            return self.given.index(timestep)
        near = [step for step, other in enumerate(self.aligned) if abs(other - timestep) <= TOLERANCE]
        if present in near:
            return present
        return min(near, key=lambda step: abs(self.aligned[step] - timestep), default=None)

    def is_near(self, step: int, timestep: float) -> bool:
        """Whether this is the step's timestep, perhaps rounded."""
        return abs(self.given[step] - timestep) <= TOLERANCE
