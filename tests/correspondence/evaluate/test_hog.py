"""Histograms of oriented gradients, by hand; and the floor that answers with them."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from d2f_core.correspondence import pck
from d2f_core.correspondence.evaluate import hog as h
from d2f_core.correspondence.evaluate.measure import measure, predict_by
from tests.correspondence.evaluate.test_measure import BACK, PAIR


def ramp(x: float, y: float, side: int = 28) -> torch.Tensor:
    """One channel that rises by x per pixel to the right and by y downwards, and two that are flat; [1, 3, h, w]."""
    across = torch.arange(side, dtype=torch.float64)
    image = torch.zeros(1, 3, side, side, dtype=torch.float64)
    image[0, 1] = x * across + y * across[:, None]
    return image


def test_a_gradient_is_that_of_the_channel_where_it_is_largest() -> None:
    size, direction = h.gradients(ramp(3, 4))
    assert_close(size[0, 5, 5], torch.tensor(10.0, dtype=torch.float64))  # over two pixels
    assert direction[0, 5, 5] == pytest.approx(math.atan2(4, 3))
    assert h.gradients(ramp(-3, -4))[1][0, 5, 5] == pytest.approx(math.atan2(4, 3)), "light to dark is as dark to light"


def test_a_direction_counts_in_the_two_nearest_bins() -> None:
    """Bin k has its centre at (k + 1/2) 20 degrees; 5 degrees lie 1/4 of the way from bin 0 to the last one."""
    angle = math.radians(5)
    found = h.histograms(ramp(math.cos(angle), math.sin(angle)))[0, :, 0, 0]
    within = h.histograms(ramp(math.cos(angle), math.sin(angle), side=42))[0, :, 1, 1]
    assert_close(within, torch.tensor([1.5, 0, 0, 0, 0, 0, 0, 0, 0.5], dtype=torch.float64))
    assert found.shape == (9,) and found.sum() < within.sum(), "at the border the gradient is over one pixel"


def test_a_cell_stands_under_the_lengths_of_its_four_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h, "histograms", lambda images, cell: images)
    monkeypatch.setattr(h, "AROUND", 0)
    cells = torch.zeros(1, 9, 2, 2, dtype=torch.float64)
    cells[0, 0] = torch.tensor([[3.0, 4.0], [0.0, 12.0]])
    cells[0, 1, 0, 0] = 0.5
    found = h.hog(cells)[0]
    lengths = [math.sqrt(value + 1e-6) for value in (4 * 9.25, 2 * 25.25, 2 * 9.25, 9.25 + 16 + 144)]
    expected = [min(3 / length, 0.2) for length in lengths], [0.5 / length for length in lengths]
    assert_close(found[0].unflatten(0, (4, 9))[:, :2].T, torch.tensor(expected, dtype=torch.float64))


def test_a_token_has_the_cells_around_it() -> None:
    images = torch.rand(1, 3, 14 * 5, 14 * 4, generator=torch.Generator().manual_seed(0))
    found = h.hog(images)
    assert found.shape == (1, 20, 9 * 4 * 9)
    middle = found.unflatten(2, (36, 9))[..., 4]
    assert_close(found.unflatten(2, (36, 9))[0, 5, :, 3], middle[0, 4]), "to the left"


def test_the_floor_answers_on_a_grid_of_small_patches_too() -> None:
    """Such as that of a transformer with patches of 8 pixels at 1,184: 148 cells of 14 pixels would be an image of
    2,072, more than any matcher is given."""
    matcher = h.hog_matcher((148, 148))
    assert matcher.preparation.size == 148 * 13
    assert matcher.features([np.zeros((30, 50, 3), np.uint8)]).shape == (1, 148**2, 324)


def test_the_floor_answers_on_a_given_grid() -> None:
    matcher = h.hog_matcher((16, 16), "pad")
    assert matcher.name == "HOG" and matcher.preparation.size == 224 and matcher.preparation.fit == "pad"
    assert matcher.features([np.zeros((30, 50, 3), np.uint8)]).shape == (1, 256, 324)
    itself = PAIR.source
    found = measure(predict_by(matcher), [PAIR, BACK])
    assert itself is not None and pck.pck(found.matches, pck.PROTOCOLS["original"].scoring, (0.5,)).point > 0
