"""Exponential moving average of weights, as a function of the step: nothing but the averages has to be saved."""

import torch
from torch import Tensor


@torch.no_grad()
def update(average: Tensor, weight: Tensor, decay: float) -> None:
    """Move `average` towards `weight` in place."""
    average.lerp_(weight.to(average), 1 - decay)
