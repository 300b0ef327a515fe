"""The straight path of flow matching: `x_t = (1 - t) * noise + t * data`, so its velocity is `data - noise`.

Flow time `t` runs from 0 (pure noise) to 1 (clean data). The distribution of training times is defined here too.
"""

import math

import torch
from torch import Tensor

from d2f_core.objective.time_sampling import TimeSampling


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Reshape per-sample numbers [batch] to [batch, 1, ...], float32 or wider, so that they broadcast to `like`."""
    dtype = like.dtype if like.dtype.itemsize >= 4 else torch.float32
    return coefficient.to(dtype).reshape(-1, *(1,) * (like.ndim - 1))


def interpolate(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """The state [batch, *dims] at flow time `t` [batch]."""
    time = expand(t, data)
    return (1 - time) * noise + time * data


def check_times(t: Tensor, state: Tensor | None = None) -> None:
    """Refuse flow times outside [0, 1], NaN, and any number of times other than one per sample of `state`."""
    if state is not None and t.shape != state.shape[:1]:
        shapes = f"t has shape {tuple(t.shape)}, the state {tuple(state.shape)}"
        raise ValueError(f"{shapes}. Give one flow time per sample: t.expand(len(x_t)).")
    if not bool(((t >= 0) & (t <= 1)).all()):
        got = f"flow times must lie in [0, 1] (0 noise, 1 data), got {t.min().item():g} to {t.max().item():g}"
        raise ValueError(f"{got}. Diffusion timesteps are not flow times: convert with NoiseSchedule.flow_times.")


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Move flow times towards noise (`shift` > 1), as larger images need: they keep more signal at equal `t`.

    Successive shifts multiply; the inverse is `shift_times(t, 1 / shift)`. Source: Esser et al., 2024,
    arXiv:2403.03206, eq. 23, which counts time from data to noise.
    """
    return t / (t + shift * (1 - t))


def resolution_shift(pixels: int, base_pixels: int) -> float:
    """The shift at which images of `pixels` pixels are as noisy as the base's own at equal flow time (same source)."""
    return math.sqrt(pixels / base_pixels)


def draw_times(sampling: TimeSampling, uniform: Tensor) -> Tensor:
    """Flow times [batch] from numbers [batch] uniform in [0, 1), by the increasing inverse distribution function."""
    t = uniform
    if sampling.distribution == "logit_normal":
        t = torch.sigmoid(sampling.mean + sampling.std * torch.special.ndtri(uniform))
    elif sampling.distribution == "mode":
        t = uniform - sampling.scale * (torch.sin(math.pi / 2 * uniform) ** 2 - uniform)
    return t if sampling.shift == 1 else shift_times(t, sampling.shift)
