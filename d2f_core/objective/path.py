"""The straight path of flow matching: `x_t = (1 - t) * noise + t * data`, so its velocity is `data - noise`.

Flow time `t` runs from 0 (pure noise) to 1 (clean data).
"""

from torch import Tensor


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Per-sample numbers [batch] as float32 or wider [batch, 1, ...], ready to multiply `like`."""
    dtype = like.dtype if like.dtype.itemsize >= 4 else None
    coefficient = coefficient.to(dtype) if dtype is not None else coefficient.float()
    return coefficient.reshape(-1, *(1,) * (like.ndim - 1))


def interpolate(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """The state [batch, *dims] at flow time `t` [batch]."""
    time = expand(t, data)
    return (1 - time) * noise + time * data


def check_times(t: Tensor) -> None:
    """Refuse flow times outside [0, 1]."""
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(
            f"flow times must lie in [0, 1] (0 noise, 1 data), got {t.min().item():g} to {t.max().item():g}. "
            "Diffusion timesteps are not flow times: convert with NoiseSchedule.flow_times."
        )
