"""Integrate a velocity field over flow time: noise to data, or backward.

From the network's noisiest trained level on, Euler in flow time equals DDIM (eta 0) on the mapped time grid.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor

from d2f_core.objective.path import check_times, shift_times

Field = Callable[[Tensor, Tensor], Tensor]
"""(x_t [batch, *dims], t [batch]) -> velocity [batch, *dims]."""


class NonFiniteStateError(FloatingPointError):
    """The network's output is not finite; it is never replaced by another value."""


def euler(field: Field, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    return x + h * field(x, t)


def midpoint(field: Field, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    return x + h * field(x + h / 2 * field(x, t), t + h / 2)


def heun(field: Field, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    first = field(x, t)
    return x + h / 2 * (first + field(x + h * first, t + h))


def rk4(field: Field, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    first = field(x, t)
    second = field(x + h / 2 * first, t + h / 2)
    third = field(x + h / 2 * second, t + h / 2)
    return x + h / 6 * (first + 2 * second + 2 * third + field(x + h * third, t + h))


STEPS: Mapping[str, Callable[..., Tensor]] = MappingProxyType({f.__name__: f for f in (euler, midpoint, heun, rk4)})
"""Solvers with fixed steps."""
ADAPTIVE = ("dopri5", "bosh3", "adaptive_heun", "dopri8")
"""Adaptive solvers of torchdiffeq. Without its `fehlberg2`, which missed its tolerance by 200 on a smooth field."""
SOLVERS = (*STEPS, *ADAPTIVE)
BETA = 0.6
"""Both parameters of the distribution whose quantiles `beta_times` takes, as published."""


class _Counted:
    """A field that counts its evaluations, and refuses outputs that are not finite."""

    def __init__(self, field: Field) -> None:
        self.field, self.calls = field, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        t = t.clamp(0, 1)  # rounding may move the last stage past the end by one unit in the last place
        velocity = self.field(x, t)
        if not bool(velocity.isfinite().all()):
            bad = [i for i, sample in enumerate(velocity) if not bool(sample.isfinite().all())]
            where = f"at flow time {t.min().item():.4g}, evaluation {self.calls}"
            advice = "Check the weights, or compute in float32 or bfloat16 instead of float16."
            raise NonFiniteStateError(f"the velocity of samples {bad} is not finite {where}. {advice}")
        return velocity


def integrate(
    field: Field, x: Tensor, times: Tensor, solver: str = "euler", *, rtol: float = 1e-4, atol: float = 1e-4
) -> tuple[Tensor, int]:
    """Integrate the state `x` [batch, *dims] along the flow times `times` [steps + 1], in either direction.

    Args:
        rtol, atol: error tolerances of the adaptive solvers.

    Returns:
        The state at the last time, and the number of network evaluations.

    Raises:
        ValueError: an unknown solver, or times outside [0, 1] or not in order.
        NonFiniteStateError: the network's output is not finite; names the samples and the time.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not known. Use one of {', '.join(SOLVERS)}.")
    check_times(times)
    differences = times.diff()
    if not len(differences) or not (bool((differences > 0).all()) or bool((differences < 0).all())):
        raise ValueError(f"times must be two or more, all rising or all falling, got {times.tolist()}.")
    counted = _Counted(field)
    if solver in ADAPTIVE:
        x = _adaptive(counted, x, times[[0, -1]], solver, rtol, atol)
    else:
        for start, end in itertools.pairwise(times):
            x = STEPS[solver](counted, x, start.expand(len(x)), end - start)
    return x, counted.calls


def _adaptive(field: Field, x: Tensor, times: Tensor, solver: str, rtol: float, atol: float) -> Tensor:
    from torchdiffeq import odeint

    def derivative(t: Tensor, state: Tensor) -> Tensor:
        return field(state, t.expand(len(state)))

    times = times.to(x.dtype)
    # The last step must end at the last time: by default a step may reach beyond it, where no network was trained.
    states = odeint(derivative, x, times, rtol=rtol, atol=atol, method=solver, options={"step_t": times[1:]})
    return cast(Tensor, states)[-1]


def _shares(steps: int, shift: float) -> Tensor:
    """0 to 1 in equal steps, float64 [steps + 1], for a number of steps and a shift that can be used."""
    if steps < 1 or not 0 < shift < math.inf:
        raise ValueError(f"steps={steps} must be at least 1 and shift={shift} above 0. Shift 1 keeps the steps equal.")
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def uniform_times(steps: int, shift: float = 1.0) -> Tensor:
    """Flow times from noise to data, float64 [steps + 1]: equidistant, then shifted towards noise by `shift`."""
    return shift_times(_shares(steps, shift), shift)


def beta_times(steps: int, shift: float = 1.0) -> Tensor:
    """As `uniform_times`, but quantiles of Beta(0.6, 0.6): short steps at both ends, and long ones between them.

    Source: Lee et al., 2024, arXiv:2407.12173.
    """
    return shift_times(_beta_quantiles(_shares(steps, shift)), shift)


def _beta_quantiles(share: Tensor) -> Tensor:
    """Quantiles of Beta(0.6, 0.6) at shares in [0, 1], float64, within 1e-14.

    Newton's method on `y = x ** 0.6`, in which the distribution function is a convex power series in x, so that it
    comes down to the root from the series' first term; the distribution is symmetric, so x is at most 1/2.
    """
    a, low = BETA, torch.minimum(share, 1 - share)
    n = torch.arange(60, dtype=share.dtype, device=share.device)
    factors = torch.cat([torch.ones_like(n[:1]), ((n[1:] - a) / n[1:]).cumprod(0)]) * a / (a + n)
    whole = a * math.exp(2 * math.lgamma(a) - math.lgamma(2 * a))
    y = low * whole
    for _ in range(8):
        x = y ** (1 / a)
        series = (factors * x[:, None] ** n).sum(1)
        y = y - (y * series - low * whole) * (1 - x) ** (1 - a)
    x = y ** (1 / a)
    return torch.where(share <= 0.5, x, 1 - x)


TIME_GRIDS: Mapping[str, Callable[[int, float], Tensor]] = MappingProxyType(
    {"uniform": uniform_times, "beta": beta_times}
)
"""Grids of flow times for solvers with fixed steps, by name."""
