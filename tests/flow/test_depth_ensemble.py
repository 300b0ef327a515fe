"""An ensemble agrees in scale and shift before it is judged, and its files say what the map says."""

import io

import numpy as np
from PIL import Image

from d2f_core.flow.depth.ensemble import coloured, combine, depth_npy, depth_png, preview_png

TRUTH = np.linspace(0.1, 0.9, 48, dtype=np.float32).reshape(6, 8)


def fitted(prediction: np.ndarray) -> np.ndarray:
    scale, shift = np.polyfit(prediction.ravel(), TRUTH.ravel(), 1)
    return scale * prediction + shift


def test_members_that_differ_in_scale_and_shift_alone_agree() -> None:
    members = np.stack([TRUTH, 0.5 * TRUTH + 0.3, 0.8 * TRUTH]).astype(np.float32)
    depth, uncertainty = combine(members)
    np.testing.assert_allclose(fitted(depth), TRUTH, atol=1e-5)
    assert uncertainty.max() < 1e-6 and depth.dtype == uncertainty.dtype == np.float32


def test_a_member_that_is_wrong_somewhere_is_outvoted_there_and_the_order_is_free() -> None:
    members = np.stack([TRUTH] * 5).astype(np.float32)
    members[1, 2, 3] = 1.0
    depth, _ = combine(members)
    np.testing.assert_allclose(fitted(depth), TRUTH, atol=0.01)
    np.testing.assert_allclose(combine(members[[4, 1, 0, 3, 2]])[0], depth, atol=1e-6)
    noisy = TRUTH + 0.1 * np.random.default_rng(0).normal(size=(9, *TRUTH.shape)) * (TRUTH > 0.5)
    _, uncertainty = combine(noisy.astype(np.float32))
    assert uncertainty[TRUTH > 0.5].mean() > 3 * uncertainty[TRUTH <= 0.5].mean()


def test_one_member_is_the_result_and_has_no_spread() -> None:
    depth, uncertainty = combine(TRUTH[None])
    np.testing.assert_array_equal(depth, TRUTH)
    assert not uncertainty.any()


def test_a_result_beyond_the_range_is_brought_back_by_scale_and_shift_never_clipped() -> None:
    wild = np.stack([TRUTH * 3 - 1] * 2).astype(np.float32)
    depth, _ = combine(wild)
    assert depth.min() == 0 and depth.max() == 1
    np.testing.assert_allclose(fitted(depth), TRUTH, atol=1e-5)


def test_flat_members_give_a_flat_map() -> None:
    depth, uncertainty = combine(np.full((3, 4, 4), 0.25, np.float32))
    assert np.isfinite(depth).all() and np.ptp(depth) == 0 and not uncertainty.any()


def test_the_png_has_16_bits_of_the_map_and_the_npy_all_of_it() -> None:
    levels = np.asarray(Image.open(io.BytesIO(depth_png(TRUTH))))
    assert levels.dtype == np.uint16
    np.testing.assert_allclose(levels / 65535, TRUTH, atol=0.51 / 65535)
    np.testing.assert_array_equal(np.load(io.BytesIO(depth_npy(TRUTH)), allow_pickle=False), TRUTH)


def test_a_preview_shows_image_and_map_and_leaves_unknown_pixels_grey() -> None:
    pixels = np.zeros((6, 8, 3), np.uint8)
    assert Image.open(io.BytesIO(preview_png(pixels, TRUTH))).size == (16, 6)
    holed = TRUTH.copy()
    holed[0, 0] = np.nan
    colours = coloured(holed)
    assert (colours[0, 0] == 128).all() and len(np.unique(colours.reshape(-1, 3), axis=0)) > 30
