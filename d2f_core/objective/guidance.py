"""Classifier-free guidance around a velocity field (Ho and Salimans, 2022, arXiv:2207.12598).

Guidance is linear and the alignment is linear in the prediction, so guiding the velocity equals guiding the prediction.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from d2f_core.objective.path import expand


def guided(
    velocity_field: Callable[..., Tensor],
    scale: float,
    condition: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The field `null + scale * (conditional - null)`, with both halves in one forward of twice the batch.

    Args:
        condition: tensors [batch, ...] by the denoiser's argument names.
        null: the same names and shapes for the empty condition. Not used at scale 1.
        rescale: in [0, 1]: how far the guided velocity's standard deviation, per sample, is scaled back to the
            conditional one's, against over-saturation (Lin et al., 2024, arXiv:2305.08891, section 3.4, on velocities).
        interval: flow times between which guidance acts; outside, only the conditional half is computed (Kynkaanniemi
            et al., 2024, arXiv:2404.07724). Without an interval the field's time need not be flow time.

    Raises:
        ValueError: `rescale` or `interval` leaves [0, 1], or the two conditions differ in names or shapes.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale={rescale} must lie in [0, 1]. Use 0 (off) to 0.7.")
    if interval and not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance interval={interval} must be two rising flow times in [0, 1].")
    if scale == 1:
        return lambda x_t, t: velocity_field(x_t, t, **condition)
    shapes = [{name: tuple(value.shape) for name, value in given.items()} for given in (condition, null)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the condition has {shapes[0]}, the empty one {shapes[1]}. Give both alike.")
    both = {name: torch.cat([condition[name], null[name]]) for name in condition}

    def field(x_t: Tensor, t: Tensor) -> Tensor:
        acts = (t >= interval[0]) & (t <= interval[1]) if interval else None
        if acts is not None and not bool(acts.any()):
            return velocity_field(x_t, t, **condition)
        conditional, unconditional = velocity_field(torch.cat([x_t, x_t]), torch.cat([t, t]), **both).chunk(2)
        velocity = unconditional + scale * (conditional - unconditional)
        if rescale:
            ratio = conditional.flatten(1).std(1) / velocity.flatten(1).std(1)
            velocity = expand(rescale * ratio + (1 - rescale), velocity) * velocity
        return velocity if acts is None else torch.where(expand(acts, velocity).bool(), velocity, conditional)

    return field
