"""The two filters by hand: what each does to a few pixels, and to none of them a rounding."""

import numpy as np
import pytest
import torch
from PIL import Image

from d2f_core.flow.evaluate.resize_filters import RESIZE_FILTERS, clean_fid, scaled_images, torch_fidelity


def grey(*rows: list[int]) -> np.ndarray:
    return np.repeat(np.array(rows, np.uint8)[:, :, None], 3, axis=2)


def test_torch_fidelity_reads_at_target_times_scale_without_half_pixels() -> None:
    found = torch_fidelity(grey([0, 100], [200, 60]), 4)
    # Positions 0, 0.5, 1 and 1.5; beyond the last pixel there is the last pixel.
    expected = [[0, 50, 100, 100], [100, 90, 80, 80], [200, 130, 60, 60], [200, 130, 60, 60]]
    assert found[1].tolist() == expected
    # Shrinking by 2 takes every second pixel and averages nothing.
    assert torch_fidelity(grey([0, 9, 50, 9], [9] * 4, [70, 9, 80, 9], [9] * 4), 2)[0].tolist() == [[0, 50], [70, 80]]


def test_clean_fid_averages_what_it_shrinks_and_rounds_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 40, 3), dtype=np.uint8)
    found = clean_fid(image, 8)
    for channel in range(3):
        plane = Image.fromarray(image[:, :, channel].astype(np.float32))
        expected = np.asarray(plane.resize((8, 8), Image.Resampling.BICUBIC)).clip(0, 255)
        np.testing.assert_array_equal(found[channel].numpy(), expected)
    assert (found != found.round()).float().mean() > 0.9 and (found - 127.5).abs().max() < 60
    edges = clean_fid(grey([0, 0, 255, 255]), 40)
    assert edges.min() == 0 and edges.max() == 255, "bicubic overshoots at an edge"


@pytest.mark.parametrize("name", sorted(RESIZE_FILTERS))
def test_images_of_the_size_stay_as_they_are(name: str) -> None:
    images = np.random.default_rng(1).integers(0, 256, (2, 12, 12, 3), dtype=np.uint8)
    found = scaled_images(images, name, 12)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.permute(0, 2, 3, 1).numpy(), images)
