"""Integrate a velocity field over flow time: noise to data, or backward.

Euler in flow time with an aligned diffusion network equals DDIM (eta 0) on the mapped time grid.
"""

import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
"""(x_t [batch, *dims], t [batch]) -> velocity [batch, *dims]."""

Step = Callable[[Field, Tensor, Tensor, Tensor], Tensor]


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


SOLVERS: Mapping[str, tuple[Step, int]] = MappingProxyType(
    {"euler": (euler, 1), "midpoint": (midpoint, 2), "heun": (heun, 2), "rk4": (rk4, 4)}
)
"""A step of each solver, and how many network evaluations it takes."""


def integrate(field: Field, x: Tensor, times: Tensor, solver: str = "euler") -> tuple[Tensor, int]:
    """Carry the state `x` [batch, *dims] along the flow times `times` [steps + 1], in either direction.

    Returns:
        The state at the last time, and the number of network evaluations.

    Raises:
        ValueError: an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not known. Use one of {', '.join(SOLVERS)}.")
    step, evaluations = SOLVERS[solver]
    for start, end in itertools.pairwise(times):
        x = step(field, x, start.expand(len(x)), end - start)
    return x, evaluations * (len(times) - 1)


def uniform_times(steps: int) -> Tensor:
    """Equidistant flow times from noise to data, float64 [steps + 1]."""
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)
