"""Exponential moving average of weights, as a function of the step: nothing but the averages has to be saved."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    decay: float = 0.999
    """Weight of the past per step, in [0, 1); 0 keeps no average."""
    start_step: int = 0
    """Steps before which the average follows the weights exactly."""
    power: float = 0.75
    """Warm-up: the decay grows as `1 - (1 + steps) ** -power` up to `decay`."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema decay={self.decay} must lie in [0, 1). Use 0.999, or 0 for none.")

    def decay_at(self, step: int) -> float:
        """The decay of the update after optimizer step `step` (counted from 1)."""
        if step <= self.start_step:
            return 0.0
        return min(self.decay, 1 - (1 + step - self.start_step) ** -self.power)


@torch.no_grad()
def update(average: Tensor, weight: Tensor, decay: float) -> None:
    """Move `average` towards `weight` in place."""
    average.lerp_(weight.to(average), 1 - decay)
