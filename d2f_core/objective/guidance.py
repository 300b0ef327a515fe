"""Classifier-free guidance around a velocity field (Ho and Salimans, 2022, arXiv:2207.12598).

Guidance is linear and the alignment is linear in the prediction, so guiding the velocity equals guiding the prediction.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def guided(
    velocity_field: Callable[..., Tensor], scale: float, condition: Mapping[str, Tensor], null: Mapping[str, Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The field `null + scale * (conditional - null)`, with both halves in one forward of twice the batch.

    Args:
        condition: tensors [batch, ...] by the denoiser's argument names.
        null: the same names and shapes for the empty condition. Not used at scale 1.
    """
    if scale == 1:
        return lambda x_t, t: velocity_field(x_t, t, **condition)
    both = {name: torch.cat([condition[name], null[name]]) for name in condition}

    def field(x_t: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = velocity_field(torch.cat([x_t, x_t]), torch.cat([t, t]), **both).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return field
