"""Three training losses with one signature.

Each takes the network as a `VelocityField`, the two ends of the path and one uniform number per sample, and returns one
loss per sample. The caller draws the random numbers, keyed by sample rather than by process. The noise may be fresh, or
the noise that the data was generated from (reflow). All refuse (ValueError) noise of another shape than the data, and
uniform numbers that are not one per sample or leave [0, 1].
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from d2f_core.objective.alignment import NaiveVelocityField, VelocityField, predict
from d2f_core.objective.path import check_times, draw_times, expand, interpolate
from d2f_core.objective.schedule import FlowTimes, ScheduleError
from d2f_core.objective.time_sampling import NaiveTarget, TimeSampling

Loss = Callable[..., Tensor]
"""(field, data, noise, uniform, mask=None, **options, **condition) -> float32 [batch]."""
UNIFORM_TIMES = TimeSampling()


def _check(data: Tensor, noise: Tensor, uniform: Tensor) -> None:
    """Refuse shapes that broadcasting would accept in silence, and uniform numbers outside [0, 1]."""
    if data.shape != noise.shape:
        raise ValueError(f"data has shape {tuple(data.shape)}, noise {tuple(noise.shape)}. Give both ends alike.")
    check_times(uniform, data)


def _mean_square(error: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean square [batch] of `error` over all but the first dimension, weighted by `mask`, which broadcasts to `error`.

    A sample without any weight has the loss 0/0 (NaN), not 0, so the training stops and names the sample.
    """
    square = error.float().square()
    if mask is None:
        return square.flatten(1).mean(1)
    widths = zip(mask.shape[1:], error.shape[1:], strict=False)
    if mask.ndim != error.ndim or len(mask) != len(error) or any(m not in (1, e) for m, e in widths):
        shapes = f"mask of shape {tuple(mask.shape)} does not fit an error of shape {tuple(error.shape)}"
        raise ValueError(f"{shapes}. Give [batch, 1, height, width] at the latent's size.")
    weight = mask.to(square.dtype).expand_as(square).flatten(1)
    return (square.flatten(1) * weight).sum(1) / weight.sum(1)


def diff2flow(
    field: VelocityField,
    data: Tensor,
    noise: Tensor,
    uniform: Tensor,
    mask: Tensor | None = None,
    times: TimeSampling = UNIFORM_TIMES,
    **condition: Any,
) -> Tensor:
    """Flow matching through the alignment: the squared error of the velocity at flow times drawn as `times` says.

    The state is mixed for the network at once, not by way of `x_t`: velocity and target are linear in (data, noise,
    prediction), so their difference takes as many operations as the diffusion loss.
    """
    _check(data, noise, uniform)
    at = field.align(t := draw_times(times, uniform).double())
    to_data, to_noise = at.scale * t, at.scale * (1 - t)
    x_dm = torch.addcmul(expand(to_noise, noise) * noise, expand(to_data, data), data)
    prediction = predict(field.denoiser, x_dm, at.timestep, **condition)
    # In place: the loss then needs the memory of the diffusion loss, plus one latent in the backward pass.
    error = (expand(at.from_prediction, data) * prediction).addcmul_(expand(at.from_x * to_noise + 1, noise), noise)
    return _mean_square(error.addcmul_(expand(at.from_x * to_data - 1, data), data), mask)


def flow_matching(
    field: VelocityField,
    data: Tensor,
    noise: Tensor,
    uniform: Tensor,
    mask: Tensor | None = None,
    times: TimeSampling = UNIFORM_TIMES,
    target: NaiveTarget = "noise_minus_data",
    **condition: Any,
) -> Tensor:
    """Naive flow matching, for comparison: the network is retrained to put out `target` at `x_t` directly.

    A perfect epsilon network begins near noise - data, so far lower: on Gaussian data of deviation 0.5 at 0.904, by the
    published sign at 2.460, and through the alignment at 0.785, which is the best possible.
    """
    _check(data, noise, uniform)
    naive = NaiveVelocityField(field.denoiser, field.schedule, target)
    t = draw_times(times, uniform)
    return _mean_square(naive(interpolate(noise, data, t), t, **condition) - (data - noise), mask)


def diffusion(
    field: VelocityField,
    data: Tensor,
    noise: Tensor,
    uniform: Tensor,
    mask: Tensor | None = None,
    min_snr_gamma: float = 0.0,
    **condition: Any,
) -> Tensor:
    """The base model's own loss: integer timesteps `floor(T * uniform)`, error in the network's prediction type.

    Args:
        min_snr_gamma: levels with a signal-to-noise ratio above this value count less; 5 is usual, 0 weights all alike.
            Source: Hang et al., 2023, arXiv:2303.09556.
    """
    _check(data, noise, uniform)
    if not 0 <= min_snr_gamma < math.inf:
        raise ValueError(f"min_snr_gamma={min_snr_gamma} must be 0 (off) or above it. Use 5.")
    schedule = field.schedule
    if isinstance(schedule, FlowTimes):
        raise ScheduleError("the diffusion loss needs a diffusion model, and this is a flow model. Use diff2flow.")
    timestep = (uniform.double() * schedule.num_timesteps).long().clamp(max=schedule.num_timesteps - 1)
    alpha_bar = schedule.alphas_cumprod.to(uniform.device)[timestep]
    alpha, sigma = expand(alpha_bar.sqrt(), data), expand((1 - alpha_bar).sqrt(), data)
    prediction = predict(field.denoiser, torch.addcmul(sigma * noise, alpha, data), timestep, **condition)
    wanted = data if field.prediction_type == "sample" else noise
    if field.prediction_type == "v_prediction":
        wanted = torch.addcmul(alpha * noise, sigma, data, value=-1)
    loss = _mean_square(prediction - wanted, mask)
    return loss * _min_snr_weight(field.prediction_type, alpha_bar, min_snr_gamma).float() if min_snr_gamma else loss


def _min_snr_weight(prediction_type: str, alpha_bar: Tensor, gamma: float) -> Tensor:
    """Weight [batch]: squared error in this prediction type -> `min(snr, gamma)` times that of the data estimate."""
    snr = alpha_bar / (1 - alpha_bar)
    data_weight = snr.clamp(max=gamma)
    return data_weight / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]


LOSSES: Mapping[str, Loss] = MappingProxyType({f.__name__: f for f in (diff2flow, flow_matching, diffusion)})


@torch.no_grad()
def flow_validation_loss(
    field: Callable[..., Tensor], data: Tensor, noise: Tensor, times: Tensor, mask: Tensor | None = None, **given: Any
) -> Tensor:
    """Squared velocity error [len(times), batch] at fixed flow times, for given noise: comparable between models."""
    _check(data, noise, times[:1].expand(len(data)))
    repeated = times.unsqueeze(1).expand(-1, len(data))
    velocities = (field(interpolate(noise, data, t), t, **given) for t in repeated)
    return torch.stack([_mean_square(velocity - (data - noise), mask) for velocity in velocities])
