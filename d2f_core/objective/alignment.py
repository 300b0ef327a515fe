"""Diffusion-to-flow alignment: read a diffusion network's output as a velocity.

A variance-preserving state `x_dm = alpha * data + sigma * noise` and the flow state `x_t` hold the same data-to-noise
ratio when `t == alpha / (alpha + sigma)`; then `x_dm == x_t / hypot(t, 1 - t)`. A network that reads `x_dm` at that
noise level therefore already knows both ends of the straight path, and `velocity = data - noise` is linear in (x_dm,
prediction).

Source: Schusterbauer et al., "Diff2Flow", CVPR 2025, arXiv:2506.02221.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2f_core.objective.path import check_times, expand
from d2f_core.objective.schedule import (
    FLOW_PREDICTION,
    FlowTimes,
    NoiseSchedule,
    Schedule,
    ScheduleError,
    check_prediction_type,
)
from d2f_core.objective.time_sampling import NaiveTarget

Denoiser = Callable[..., Tensor]
"""(x_dm [batch, *dims], timestep [batch], **condition) -> prediction [batch, *dims]."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How to query the network at flow times, and how to read its output as a velocity; float64 [batch]."""

    timestep: Tensor
    """The network's own timestep, fractional."""
    scale: Tensor
    """`x_dm = scale * x_t`."""
    from_x: Tensor
    from_prediction: Tensor
    """`velocity = from_x * x_dm + from_prediction * prediction`."""


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """Data and noise coefficients [batch] of the diffusion state aligned with flow time `t` [batch].

    Closed form: unit variance fixes the one scale that the ratio leaves free, so nothing is interpolated.
    """
    norm = torch.hypot(t, 1 - t)
    return t / norm, (1 - t) / norm


def _data_coefficients(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(from_x, from_prediction) of the data estimate at a noise level."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    return (alpha, -sigma) if prediction_type == "v_prediction" else (torch.zeros_like(alpha), torch.ones_like(alpha))


def _noise_coefficients(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(from_x, from_prediction) of the noise estimate at a noise level."""
    if prediction_type == "sample":
        return 1 / sigma, -alpha / sigma
    return (sigma, alpha) if prediction_type == "v_prediction" else (torch.zeros_like(alpha), torch.ones_like(alpha))


def align(schedule: Schedule, prediction_type: str, t: Tensor) -> Alignment:
    """The exact alignment at flow times `t` [batch]. For a flow network there is nothing to align.

    Below t = 1/2 the velocity is `(data - x_t) / (1 - t)`, above it `(x_t - noise) / t`: both are exact inside the
    trained range, and neither divides by something that goes to 0. Outside the range the network is read at its
    nearest trained level: below, its data estimate is kept; above, its score, so that noise shrinks as
    `sigma(t) / sigma(level)`.
    """
    t = t.double()
    if prediction_type == FLOW_PREDICTION:
        one, nothing = torch.ones_like(t), torch.zeros_like(t)
        return Alignment(timestep=schedule.timestep_at(t), scale=one, from_x=nothing, from_prediction=-one)
    level = t.clamp(*schedule.trained_range)
    alpha, sigma = alpha_sigma(level)
    norm = torch.hypot(t, 1 - t)  # x_t == norm * x_dm
    shrink = alpha_sigma(t)[1] / sigma
    data_x, data_p = _data_coefficients(prediction_type, alpha, sigma)
    noise_x, noise_p = _noise_coefficients(prediction_type, alpha, sigma)
    early = t < 0.5
    far = torch.where(early, 1 - t, t)
    return Alignment(
        timestep=schedule.timestep_at(t),
        scale=1 / norm,
        from_x=torch.where(early, data_x - norm, norm - shrink * noise_x) / far,
        from_prediction=torch.where(early, data_p, -shrink * noise_p) / far,
    )


def align_as_published(schedule: NoiseSchedule, prediction_type: str, t: Tensor) -> Alignment:
    """The map of the paper's published code, for comparisons: `t` in [0, 1) [batch].

    Timestep and scale come from a table with the clean level prepended; the coefficients of the prediction come from
    the table without it, at the same index, one level apart. Between levels, alpha and sigma are interpolated linearly.
    Below the trained range the table is extrapolated, so the timestep moves on from T - 1 towards T.
    """
    bars = schedule.alphas_cumprod.to(t.device)
    longer = torch.cat([bars.new_ones(1), bars])
    alpha, sigma = longer.sqrt(), (1 - longer).sqrt()
    times = alpha / (alpha + sigma)  # decreasing from 1
    t = t.double()
    # Below the trained range the published lookup wraps around to the clean end: it interpolates over all times.
    level = torch.searchsorted(-times, -t).clamp(max=len(times))
    inside = level < len(times)
    below, above = level.clamp(1, len(times) - 1), (level - 1).clamp(0, len(times) - 2)
    part = (t - times[below]) / (times[above] - times[below])
    timestep = torch.where(inside, below - part, len(bars) - (times[-1] - t) / (times[0] - times[-1]))
    alpha_read, sigma_read = _between(bars.sqrt(), timestep), _between((1 - bars).sqrt(), timestep)
    norm = alpha_read + sigma_read
    from_x, from_prediction = {
        "epsilon": (1 / alpha_read, -norm / alpha_read),
        "v_prediction": (alpha_read - sigma_read, -norm),
        "sample": (-1 / sigma_read, norm / sigma_read),
    }[prediction_type]
    scale = _between(alpha + sigma, timestep)
    return Alignment(timestep=timestep, scale=scale, from_x=from_x, from_prediction=from_prediction)


def _between(table: Tensor, index: Tensor) -> Tensor:
    """Values of a table at fractional indices, interpolated linearly; past the table's end, its last value."""
    index = index.clamp(0, len(table) - 1)
    low = index.floor().long().clamp(max=len(table) - 2)
    return table[low] + (table[low + 1] - table[low]) * (index - low)


def predict(denoiser: Denoiser, x: Tensor, timestep: Tensor, **condition: Any) -> Tensor:
    """The network's prediction [batch, *dims] at a state [batch, *dims] and the network's own timesteps [batch]."""
    prediction = denoiser(x, timestep.float(), **condition)
    if prediction.shape != x.shape:
        shapes = f"the network maps {tuple(x.shape)} to {tuple(prediction.shape)}; shapes must be equal"
        raise ValueError(f"{shapes}. A network that also predicts variances needs its first half split off.")
    return prediction


@dataclass(frozen=True)
class VelocityField:
    """A diffusion network as a velocity field: the Diff2Flow model."""

    denoiser: Denoiser
    schedule: Schedule
    prediction_type: str
    paper_compat: bool = False
    """Use `align_as_published`, only for comparison with the paper's code."""

    def __post_init__(self) -> None:
        if isinstance(self.schedule, FlowTimes) != (self.prediction_type == FLOW_PREDICTION):
            raise ScheduleError(
                f"prediction_type={self.prediction_type!r} does not go with {type(self.schedule).__name__}. Take both "
                "from one scheduler config, by prediction_type_of and read_schedule."
            )
        check_prediction_type(self.prediction_type, self.schedule.trained_range[0])

    def align(self, t: Tensor) -> Alignment:
        if self.paper_compat and isinstance(self.schedule, NoiseSchedule):
            return align_as_published(self.schedule, self.prediction_type, t)
        return align(self.schedule, self.prediction_type, t)

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """Velocity [batch, *dims], float32 or wider, at the flow state `x_t` [batch, *dims] and times `t` [batch].

        Raises:
            ValueError: times are outside [0, 1] or not one per sample, or the network changes the shape.
        """
        check_times(t, x_t)
        at = self.align(t)
        x_dm = expand(at.scale, x_t) * x_t
        prediction = predict(self.denoiser, x_dm, at.timestep, **condition)
        return expand(at.from_x, x_dm) * x_dm + expand(at.from_prediction, prediction) * prediction


@dataclass(frozen=True)
class NaiveVelocityField:
    """A network finetuned by the naive `flow_matching` loss: it is called with `x_t` at the timestep `T (1 - t)`, and
    its output is the velocity, or minus the velocity.
    """

    denoiser: Denoiser
    schedule: Schedule
    target: NaiveTarget = "noise_minus_data"
    """What it was trained to put out."""

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """Velocity [batch, *dims] at the flow state `x_t` [batch, *dims] and flow times `t` [batch]."""
        check_times(t, x_t)
        prediction = predict(self.denoiser, x_t, self.schedule.num_timesteps * (1 - t), **condition)
        return -prediction if self.target == "noise_minus_data" else prediction
