"""Three training losses with one signature.

Each takes the network as a `VelocityField`, the two ends of the path and one uniform number per sample, and returns one
loss per sample. Which numbers are drawn is the caller's business: they belong to the sample, not to the process.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from d2f_core.objective.alignment import NaiveVelocityField, VelocityField
from d2f_core.objective.path import expand, interpolate

Loss = Callable[..., Tensor]
"""(field, data, noise, uniform, **condition) -> float32 [batch]."""


def _mean_square(error: Tensor) -> Tensor:
    return error.float().square().flatten(1).mean(1)


def diff2flow(field: VelocityField, data: Tensor, noise: Tensor, uniform: Tensor, **condition: Any) -> Tensor:
    """Flow matching through the alignment: flow time is `uniform`, the error is the velocity's."""
    x_t = interpolate(noise, data, uniform)
    return _mean_square(field(x_t, uniform, **condition) - (data - noise))


def flow_matching(field: VelocityField, data: Tensor, noise: Tensor, uniform: Tensor, **condition: Any) -> Tensor:
    """Naive flow matching, for comparison: the network is retrained to put out the velocity of `x_t` itself."""
    naive = NaiveVelocityField(field.denoiser, field.schedule)
    return _mean_square(naive(interpolate(noise, data, uniform), uniform, **condition) - (data - noise))


def diffusion(field: VelocityField, data: Tensor, noise: Tensor, uniform: Tensor, **condition: Any) -> Tensor:
    """The base model's own loss: integer timesteps `floor(T * uniform)`, error in the network's prediction type."""
    schedule = field.schedule
    timestep = (uniform.double() * schedule.num_timesteps).long().clamp(max=schedule.num_timesteps - 1)
    alpha_bar = schedule.alphas_cumprod.to(uniform.device)[timestep]
    alpha, sigma = expand(alpha_bar.sqrt(), data), expand((1 - alpha_bar).sqrt(), data)
    prediction = field.denoiser(alpha * data + sigma * noise, timestep.float(), **condition)
    if field.prediction_type == "epsilon":
        return _mean_square(prediction - noise)
    if field.prediction_type == "v_prediction":
        return _mean_square(prediction - (alpha * noise - sigma * data))
    return _mean_square(prediction - data)


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {"diff2flow": diff2flow, "flow_matching": flow_matching, "diffusion": diffusion}
)


@torch.no_grad()
def flow_validation_loss(
    velocity_field: Callable[..., Tensor], data: Tensor, noise: Tensor, times: Tensor, **condition: Any
) -> Tensor:
    """Squared velocity error [len(times), batch] at fixed flow times, for given noise: comparable between models."""
    errors = []
    for time in times:
        t = time.expand(len(data))
        errors.append(_mean_square(velocity_field(interpolate(noise, data, t), t, **condition) - (data - noise)))
    return torch.stack(errors)
