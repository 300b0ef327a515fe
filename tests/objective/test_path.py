"""Flow times: drawn by a map of uniform numbers, moved by a shift that can be undone."""

import math

import pytest
import torch

from d2f_core.objective.path import check_times, draw_times, shift_times
from d2f_core.objective.time_sampling import TimeSampling

UNIFORM = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


@pytest.mark.parametrize(
    "sampling",
    [
        TimeSampling(),
        TimeSampling(distribution="logit_normal"),
        TimeSampling(distribution="logit_normal", mean=-1.0, std=0.3, shift=3.0),
        TimeSampling(distribution="mode", scale=1.75),
        TimeSampling(distribution="mode", scale=-1.0),
    ],
)
def test_times_rise_from_0_to_1(sampling):
    t = draw_times(sampling, UNIFORM)
    assert (t.diff() >= 0).all()
    ends = draw_times(sampling, torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))
    check_times(draw_times(sampling, torch.tensor([0.0, 1 - 2**-24, 1.0])))


def test_logit_normal_has_the_logits_it_says():
    logits = torch.logit(draw_times(TimeSampling(distribution="logit_normal", mean=0.4, std=0.8), UNIFORM))
    assert logits.mean() == pytest.approx(0.4, abs=1e-3) and logits.std() == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(("scale", "density"), [(1.29, 1 / (1 + 1.29 * (1 - math.pi / 2))), (-0.5, 0.78), (0.0, 1.0)])
def test_mode_draws_the_middle_as_often_as_its_density_says(scale, density):
    t = draw_times(TimeSampling(distribution="mode", scale=scale), UNIFORM)
    share = ((t > 0.49) & (t < 0.51)).double().mean() / 0.02
    assert share == pytest.approx(density, rel=0.02)


def test_shift_moves_towards_noise_and_back():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert (shift_times(t, 3.0)[1:-1] < t[1:-1]).all()
    torch.testing.assert_close(shift_times(shift_times(t, 3.0), 1 / 3), t)
    assert float(shift_times(torch.tensor(0.5), 3.0)) == pytest.approx(0.25)


def test_a_training_whose_time_is_the_noise_has_the_same_shift_and_the_other_mean():
    """Trainers of rectified flow draw sigma = 1 - t: a normal logit of mean -0.2 and deviation 1.5, shifted by 2.5."""
    sigma = torch.sigmoid(-0.2 + 1.5 * torch.special.ndtri(UNIFORM))
    sigma = 2.5 * sigma / (1 + (2.5 - 1) * sigma)
    ours = draw_times(TimeSampling(distribution="logit_normal", mean=0.2, std=1.5, shift=2.5), UNIFORM)
    torch.testing.assert_close(ours.sort().values, (1 - sigma).sort().values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distribution": "cosine"}, "'cosine' is not known"),
        ({"std": 0.0}, "std=0.0"),
        ({"shift": -1.0}, "shift=-1.0"),
        ({"distribution": "mode", "scale": 2.0}, "times would run backward"),
    ],
)
def test_samplings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TimeSampling(**fields)
