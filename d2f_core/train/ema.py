"""Exponential moving average of weights; its decay depends only on the step, so only the averages are saved."""

import torch
from torch import Tensor


@torch.no_grad()
def update(average: Tensor, weight: Tensor, decay: float) -> None:
    """Move `average` towards `weight` in place."""
    average.lerp_(weight.to(average), 1 - decay)
