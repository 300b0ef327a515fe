"""Reads a diffusion network as a rectified flow that counts `sigma = 1 - t`, in torch alone.

A flow state is `x = sigma * noise + (1 - sigma) * data`: sigma 1 is noise, 0 is data. The network was trained on levels
`alpha * data + beta * noise` with `alpha^2 + beta^2 == 1`, each of which holds the data-to-noise ratio of one flow time
`t = alpha / (alpha + beta)`. This is the alignment of Diff2Flow (Schusterbauer et al., arXiv:2506.02221), for
samplers that ask for the data estimate at a sigma.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPSILON, V, SAMPLE, FLOW = "epsilon", "v_prediction", "sample", "flow"
PREDICTION_TYPES = (EPSILON, V, SAMPLE, FLOW)
"""What the network puts out; `flow`: noise - data, read at the unscaled state and at timestep T * sigma."""
STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
"""Schedule of SD 1.5, SD 2.1 and SDXL, by diffusers' names."""
POWERS = {"linear": 1, "scaled_linear": 2}


class SettingError(ValueError):
    """A setting cannot be used; the message gives the value, the rule and the fix."""


class Reading(NamedTuple):
    """How to ask the network at each sigma, and the data estimate that its answer is; float64 [batch]."""

    scale: Tensor
    """The network is given `scale * x`."""
    timestep: Tensor
    """The network's own timestep, fractional."""
    from_x: Tensor
    from_output: Tensor
    """`data = from_x * x + from_output * output`."""


def _number(schedule: Mapping[str, Any], name: str) -> float:
    value = schedule.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SettingError(f"the schedule has {name}={value!r}; it must be a number above 0. Choose another schedule.")
    return value


def _betas(schedule: Mapping[str, Any]) -> Tensor:
    if schedule.get("trained_betas") is not None:
        try:
            return torch.tensor(schedule["trained_betas"], dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SettingError(f"trained_betas are no list of numbers ({error}). Choose another schedule.") from error
    count, kind = int(_number(schedule, "num_train_timesteps")), schedule.get("beta_schedule")
    if kind == "squaredcos_cap_v2":
        bars = [math.cos((k / count + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(count + 1)]
        return torch.tensor([min(1 - bars[k + 1] / bars[k], 0.999) for k in range(count)], dtype=torch.float64)
    if kind not in POWERS:
        known = f"{', '.join(POWERS)}, squaredcos_cap_v2, or trained_betas"
        raise SettingError(f"beta_schedule={kind!r} is not known. Choose one of {known}.")
    power = POWERS[kind]
    start, end = (_number(schedule, name) ** (1 / power) for name in ("beta_start", "beta_end"))
    return torch.linspace(start, end, count, dtype=torch.float64) ** power


def flow_times(schedule: Mapping[str, Any]) -> Tensor:
    """Float64 [T], falling: the flow time of each of the network's timesteps, from a diffusers scheduler config.

    Raises:
        SettingError: a field is missing, unknown or out of range.
    """
    betas = _betas(schedule)
    if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
        raise SettingError("betas must be at least two numbers between 0 and 1. Choose another schedule.")
    alpha = torch.cumprod(1 - betas, dim=0).sqrt()
    if schedule.get("rescale_betas_zero_snr"):  # Lin et al. 2024, arXiv:2305.08891
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return alpha / (alpha + (1 - alpha**2).sqrt())


def rectified_times(count: int) -> Tensor:
    """Float64 [count], falling: the flow time of each timestep of a network with prediction type `flow`."""
    return 1 - torch.arange(count, dtype=torch.float64) / count


def shift_sigma(sigma: Any, shift: float) -> Any:
    """Move sigmas (a tensor or a number in [0, 1]) towards 1, which is noise, by a shift above 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _timestep(times: Tensor, t: Tensor) -> Tensor:
    """Linear in `t` between neighbours in the table of flow times, the nearest timestep outside it."""
    rising = times.flip(0)
    t = t.clamp(rising[0], rising[-1])
    right = torch.searchsorted(rising, t).clamp(1, len(rising) - 1)
    low, high = rising[right - 1], rising[right]
    return len(rising) - right - (t - low) / (high - low)


def _ends(prediction_type: str, alpha: Tensor, noise: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(from the scaled state, from the output) of the data estimate, and of the noise estimate, at a trained level."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == EPSILON:
        return (1 / alpha, -noise / alpha), (zero, one)
    if prediction_type == V:
        return (alpha, -noise), (noise, alpha)
    return (zero, one), (1 / noise, -alpha / noise)


def check(prediction_type: str, times: Tensor) -> None:
    """Refuse unknown prediction types, and epsilon where the last level has no signal.

    Raises:
        SettingError: says which one it is.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise SettingError(
            f"prediction_type={prediction_type!r} is not known. Use one of {', '.join(PREDICTION_TYPES)}."
        )
    if prediction_type == EPSILON and times[-1] == 0:
        raise SettingError(
            "prediction_type 'epsilon' with zero terminal SNR: at zero signal, noise says nothing about the data. "
            "Choose v_prediction, or the schedule without zero terminal SNR."
        )


def read(times: Tensor, prediction_type: str, sigma: Tensor) -> Reading:
    """How to read the network at `sigma` [batch] in [0, 1], given its flow times [T].

    Outside the trained levels the network is asked at the nearest one: towards noise its data estimate is kept,
    towards data its score, so that noise shrinks as it would along the trained levels.
    """
    sigma = sigma.double()
    t = 1 - sigma
    if prediction_type == FLOW:
        return Reading(torch.ones_like(t), len(times) * sigma, torch.ones_like(t), -sigma)
    level = t.clamp(times[-1], times[0])
    size, norm = torch.hypot(level, 1 - level), torch.hypot(t, sigma)
    alpha, noise = level / size, (1 - level) / size
    (data_x, data_out), (noise_x, noise_out) = _ends(prediction_type, alpha, noise)
    shrink = sigma / norm / noise
    # Near data the estimate is x minus the noise, over t: it divides by nothing that goes to 0 there.
    early, safe = t < 0.5, t.clamp(min=0.5)
    late_x, late_out = (1 - sigma * shrink * noise_x / norm) / safe, -sigma * shrink * noise_out / safe
    return Reading(
        scale=1 / norm,
        timestep=_timestep(times, t),
        from_x=torch.where(early, data_x / norm, late_x),
        from_output=torch.where(early, data_out, late_out),
    )
