"""Straightness is 0 for straight paths, and the closed form for bent ones."""

import pytest
import torch

from d2f_core.flow.evaluate.straightness import straightness
from d2f_core.objective.solver import uniform_times

NOISE = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def test_a_constant_velocity_is_straight_whatever_the_steps() -> None:
    target = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    for shift in (1.0, 3.0):
        found = straightness(lambda x, t: target - NOISE, NOISE, uniform_times(7, shift))
        torch.testing.assert_close(found, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_velocity_that_grows_with_time_has_its_variance_over_its_mean_squared() -> None:
    """v = 2t, exactly: the integral of (2t - 1)^2 is 1/3; left sums of n steps converge to it from their own mean."""
    ones = torch.ones_like(NOISE)
    found = straightness(lambda x, t: 2 * t.view(-1, 1, 1, 1) * ones, NOISE, uniform_times(2000))
    torch.testing.assert_close(found, torch.full((3,), 1 / 3, dtype=torch.float64), atol=2e-3, rtol=0)


def test_uneven_steps_are_weighted_by_their_length() -> None:
    """Velocity 0 on the first quarter, 4/3 after: mean 1, variance 1/4 * 1 + 3/4 * 1/9 = 1/3."""
    times = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    found = straightness(lambda x, t: (t > 0.2).double().view(-1, 1, 1, 1) * 4 / 3 + 0 * x, NOISE, times)
    assert found.tolist() == pytest.approx([1 / 3] * 3, rel=1e-5)
