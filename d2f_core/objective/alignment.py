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

from d2f_core.objective.path import expand
from d2f_core.objective.schedule import NoiseSchedule

Denoiser = Callable[..., Tensor]
"""(x_dm [batch, *dims], timestep [batch], **condition) -> prediction [batch, *dims]."""

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


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
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def _noise_coefficients(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(from_x, from_prediction) of the noise estimate at a noise level."""
    if prediction_type == "epsilon":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "v_prediction":
        return sigma, alpha
    return 1 / sigma, -alpha / sigma


def velocity_coefficients(schedule: NoiseSchedule, prediction_type: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 (from_x, from_prediction) [batch]: `velocity = from_x * x_dm + from_prediction * prediction`.

    Below t = 1/2 the velocity is `(data - x_t) / (1 - t)`, above it `(x_t - noise) / t`: both are exact inside the
    trained range, and neither divides by something that goes to 0. Outside the range the network is read at its
    nearest trained
    level: below, its data estimate is kept; above, its score, so that noise shrinks as `sigma(t) / sigma(level)`.
    """
    t = t.double()
    level = t.clamp(*schedule.trained_range)
    alpha, sigma = alpha_sigma(level)
    norm = torch.hypot(t, 1 - t)  # x_t == norm * x_dm
    shrink = alpha_sigma(t)[1] / sigma
    data_x, data_p = _data_coefficients(prediction_type, alpha, sigma)
    noise_x, noise_p = _noise_coefficients(prediction_type, alpha, sigma)
    early = t < 0.5
    far = torch.where(early, 1 - t, t)
    from_x = torch.where(early, data_x - norm, norm - shrink * noise_x) / far
    from_prediction = torch.where(early, data_p, -shrink * noise_p) / far
    return from_x, from_prediction


@dataclass(frozen=True)
class VelocityField:
    """A diffusion network as a velocity field: the Diff2Flow model."""

    denoiser: Denoiser
    schedule: NoiseSchedule
    prediction_type: str

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type={self.prediction_type!r} is not known. Use one of {', '.join(PREDICTION_TYPES)}, "
                "as the base model's scheduler config says."
            )

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """Velocity [batch, *dims], float32 or wider, at the flow state `x_t` [batch, *dims] and times `t` [batch]."""
        x_dm = x_t / expand(torch.hypot(t.double(), 1 - t.double()), x_t)
        prediction = self.denoiser(x_dm, self.schedule.timestep_at(t).float(), **condition)
        if prediction.shape != x_t.shape:
            raise ValueError(
                f"the network maps {tuple(x_t.shape)} to {tuple(prediction.shape)}; shapes must be equal. "
                "A network that also predicts variances needs its first half split off."
            )
        from_x, from_prediction = velocity_coefficients(self.schedule, self.prediction_type, t)
        return expand(from_x, x_dm) * x_dm + expand(from_prediction, prediction) * prediction


@dataclass(frozen=True)
class NaiveVelocityField:
    """A network finetuned by the naive `flow_matching` loss: its output is the velocity, its timestep `T (1 - t)`."""

    denoiser: Denoiser
    schedule: NoiseSchedule

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """Velocity [batch, *dims] at the flow state `x_t` [batch, *dims] and flow times `t` [batch]."""
        return self.denoiser(x_t, (self.schedule.num_timesteps * (1 - t)).float(), **condition)
