"""Errors of depth do not depend on scale and shift, and the floors are what they are called."""

import numpy as np
import pytest

from d2f_core.evaluation.bootstrap import bootstrap_blocks, bootstrap_counts
from d2f_core.flow.depth.config import FLOORS
from d2f_core.flow.depth.errors import (
    depth_errors,
    depth_sums,
    estimate_metric,
    floor_maps,
    mean_depth,
    resized,
    square,
)
from d2f_core.flow.depth.figures import ShownDepth, draw_errors, draw_maps
from d2f_core.flow.depth.metrics import METRICS
from d2f_core.flow.depth.protocol import Protocol
from tests.depth_tables import true_depth

TRUTH = square(true_depth(0))


def test_a_perfect_map_of_any_scale_and_shift_has_no_error_and_holes_do_not_count() -> None:
    prediction = np.nan_to_num(0.03 * TRUTH - 0.1, nan=77.0)
    found = depth_errors(prediction, TRUTH)
    assert found["abs_rel"] < 1e-6 and found["delta1"] == 1 and found["silog"] < 1e-4
    assert depth_errors(np.random.default_rng(0).normal(size=TRUTH.shape), TRUTH)["abs_rel"] > 0.02


def test_a_map_of_another_size_is_brought_to_the_truths() -> None:
    plane = np.linspace(2, 4, 32, dtype=np.float32)[:, None].repeat(32, 1)
    assert resized(plane, (8, 8)).shape == (8, 8)
    small = np.linspace(2, 4, 8, dtype=np.float32)[:, None].repeat(8, 1)
    assert depth_errors(plane, small)["abs_rel"] < 0.01


def test_floors_are_the_constant_the_ramp_and_the_mean_of_what_was_seen() -> None:
    truths = [square(true_depth(seed)) for seed in range(6)]
    parts = [depth_sums(truths[:2], 16, squares=True), depth_sums(truths[2:], 16, squares=True)]
    mean = mean_depth(parts[0] + parts[1])
    seen = np.ma.masked_invalid(np.stack(truths)).mean(0).filled(np.nan)
    known = np.isfinite(seen)
    np.testing.assert_allclose(mean[known], seen[known], rtol=1e-5)
    assert np.isfinite(mean).all()
    floors = floor_maps(mean)
    errors = {name: depth_errors(values, TRUTH) for name, values in floors.items()}
    assert tuple(errors) == FLOORS
    valid = np.isfinite(TRUTH)
    constant = np.abs(TRUTH[valid].mean() - TRUTH[valid]) / TRUTH[valid]
    assert errors["constant"]["abs_rel"] == pytest.approx(constant.mean(), rel=1e-5)
    assert errors["vertical ramp"]["abs_rel"] < errors["constant"]["abs_rel"], "the far end is at the top"


def test_intervals_hold_the_mean_and_images_are_resampled_alike() -> None:
    generator = np.random.default_rng(0)
    values = generator.uniform(0.1, 0.3, 40)
    shifted = values + 0.1
    found = {"a": {2: values, 4: values}, "b": {2: shifted}, "constant": {0: shifted}}
    metrics = {name: estimate_metric(name, found) for name in METRICS}
    a, b = metrics["abs_rel"].values["a"][2], metrics["abs_rel"].values["b"][2]
    assert a.low < a.value < a.high and a.value == pytest.approx(values.mean()) and a.count == 40
    np.testing.assert_allclose(b.replicates - a.replicates, 0.1, atol=1e-12)
    assert metrics["delta1"].higher_is_better and not metrics["rmse"].higher_is_better
    assert draw_errors(metrics, "a title").startswith(b"\x89PNG")


def test_a_sheet_shows_maps_of_any_size() -> None:
    shown = ShownDepth(
        image=np.zeros((16, 16, 3), np.uint8), truth=TRUTH, predictions={"2": np.zeros((8, 8)), "4": TRUTH}
    )
    assert draw_maps([shown] * 2, "maps").startswith(b"\x89PNG")


def test_blocks_of_draws_are_the_draws_of_one_whole() -> None:
    whole = bootstrap_counts(50, 23, 3)
    for most in (1, 120, 10_000):
        np.testing.assert_array_equal(np.concatenate(list(bootstrap_blocks(50, 23, 3, most=most))), whole)


def test_the_mean_depth_of_whole_images_is_stretched_over_them() -> None:
    """A ramp from left to right is its own mean at any width; a square would cut its ends off."""
    ramps = [np.linspace(1, 3, width, dtype=np.float32)[None].repeat(30, 0) for width in (60, 90)]
    mean = mean_depth(depth_sums(ramps, 30, squares=False))
    np.testing.assert_allclose(mean[0], np.linspace(1, 3, 30), atol=0.05)
    assert mean_depth(depth_sums(ramps, 30, squares=True))[0, 0] > 1.4
    assert depth_errors(mean, ramps[0])["abs_rel"] < 0.01


def test_floors_are_in_metres_so_that_they_need_no_shift() -> None:
    mean = np.linspace(6, 2, 16, dtype=np.float32)[:, None].repeat(16, 1) + np.linspace(0, 1, 16, dtype=np.float32)
    for alignment in ("none", "median", "scale"):
        protocol = Protocol(alignment=alignment)
        errors = {name: depth_errors(values, mean, protocol)["abs_rel"] for name, values in floor_maps(mean).items()}
        assert errors["mean depth"] < 1e-6 < errors["vertical ramp"] < 0.1 < errors["constant"] < 0.5
