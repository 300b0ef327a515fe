"""Depth errors against values worked out by hand."""

import math
from typing import get_args

import numpy as np
import pytest

from d2f_core.flow.depth.config import Alignment
from d2f_core.flow.depth.metrics import (
    ALIGNMENTS,
    METRICS,
    DepthError,
    DepthShapeError,
    NonPositiveDepthError,
    NoValidPixelsError,
    align_median,
    align_none,
    align_scale,
    align_scale_shift,
    depth_metrics,
)

TARGET = np.array([[[1.0, 2.0], [4.0, 8.0]]])


def test_a_perfect_prediction_has_no_error() -> None:
    found = depth_metrics(TARGET, TARGET)
    assert set(found) == set(METRICS)
    assert {name: value.item() for name, value in found.items()} == {
        **dict.fromkeys(METRICS, 0.0), "delta1": 1.0, "delta2": 1.0, "delta3": 1.0
    }  # fmt: skip


def test_twice_the_depth_has_the_closed_forms() -> None:
    found = {name: value.item() for name, value in depth_metrics(2 * TARGET, TARGET).items()}
    assert found["abs_rel"] == pytest.approx(1)
    assert found["sq_rel"] == pytest.approx(TARGET.mean())
    assert found["rmse"] == pytest.approx(math.sqrt(np.square(TARGET).mean()))
    assert found["rmse_log"] == pytest.approx(math.log(2))
    assert found["log10"] == pytest.approx(math.log10(2))
    assert found["silog"] == pytest.approx(0, abs=1e-6), "a scale is not seen"
    assert (found["delta1"], found["delta2"], found["delta3"]) == (0, 0, 0), "2 is above 1.25^3"


def test_silog_is_the_deviation_of_the_log_error_in_percent() -> None:
    prediction = TARGET * np.exp([[[0.1, -0.1], [0.1, -0.1]]])
    assert depth_metrics(prediction, TARGET)["silog"].item() == pytest.approx(10)


@pytest.mark.parametrize(
    ("factor", "deltas"), [(1.2, (1, 1, 1)), (1 / 1.3, (0, 1, 1)), (1.6, (0, 0, 1)), (2, (0, 0, 0))]
)
def test_deltas_are_shares_of_pixels_within_powers_of_a_ratio(factor: float, deltas: tuple[int, ...]) -> None:
    found = depth_metrics(factor * TARGET, TARGET)
    assert tuple(found[f"delta{power}"].item() for power in (1, 2, 3)) == deltas


def test_invalid_pixels_are_not_looked_at() -> None:
    prediction, valid = TARGET.copy(), np.array([[[True, True], [True, False]]])
    prediction[0, 1, 1] = np.nan
    target = TARGET.copy()
    target[0, 1, 1] = 0
    assert depth_metrics(prediction, target, valid)["rmse"].item() == 0


def test_each_image_has_its_own_value_and_its_own_alignment() -> None:
    target = np.concatenate([TARGET, TARGET + 1])
    prediction = np.stack([(target[0] - 5) / 3, 10 - 2 * target[1]])
    np.testing.assert_allclose(align_scale_shift(prediction, target), target, atol=1e-12)
    found = depth_metrics(np.concatenate([TARGET, 2 * (TARGET + 1)]), target)
    np.testing.assert_allclose(found["abs_rel"], [0, 1])


def test_the_alignment_is_the_least_squares_fit_to_valid_pixels() -> None:
    generator = np.random.default_rng(0)
    prediction, target = generator.normal(size=(1, 6, 7)), generator.normal(size=(1, 6, 7))
    valid = generator.random((1, 6, 7)) < 0.7
    aligned = align_scale_shift(prediction, target, valid)
    scale, shift = np.polyfit(prediction[valid], target[valid], 1)
    np.testing.assert_allclose(aligned, scale * prediction + shift, atol=1e-12)


def test_a_flat_prediction_becomes_the_targets_mean() -> None:
    np.testing.assert_allclose(align_scale_shift(np.ones_like(TARGET), TARGET), TARGET.mean())


def test_a_floor_raises_what_an_alignment_made_negative() -> None:
    prediction = TARGET.copy()
    prediction[0, 0, 0] = -1
    found = depth_metrics(prediction, TARGET, floor=1e-3)
    assert found["abs_rel"].item() == pytest.approx(0.999 / 4)


@pytest.mark.parametrize(
    ("prediction", "target", "valid", "kind", "message"),
    [
        (TARGET[0], TARGET[0], None, DepthShapeError, r"must all be the same \[n, height, width\]"),
        (TARGET, TARGET[:, :1], None, DepthShapeError, r"target \(1, 1, 2\)"),
        (TARGET, TARGET, np.ones((1, 2, 2)), DepthShapeError, "valid has the type float64"),
        (TARGET, TARGET, np.zeros((1, 2, 2), bool), NoValidPixelsError, "image 0 has 0 valid pixels, needs 1"),
        (-TARGET, TARGET, None, NonPositiveDepthError, r"prediction is -1.0 at the valid pixel \(0, 0\) .* a floor"),
        (TARGET, TARGET * 0, None, NonPositiveDepthError, "target is 0.0"),
        (TARGET * np.inf, TARGET, None, NonPositiveDepthError, "prediction is inf"),
    ],
)
def test_what_cannot_be_compared_is_refused(prediction, target, valid, kind: type[DepthError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        depth_metrics(prediction, target, valid)
    assert isinstance(caught.value, ValueError)


def test_an_alignment_needs_two_finite_pixels() -> None:
    one = np.array([[[True, False], [False, False]]])
    with pytest.raises(NoValidPixelsError, match="has 1 valid pixels, needs 2"):
        align_scale_shift(TARGET, TARGET, one)
    with pytest.raises(DepthError, match="prediction is not finite"):
        align_scale_shift(TARGET * np.nan, TARGET)


def test_alignments_by_one_number_against_values_worked_out_by_hand() -> None:
    """Of 1, 2, 4, 8 and the prediction 1, 1, 1, 5: least squares give (1 + 2 + 4 + 40) / 28, medians 3 / 1."""
    prediction = np.array([[[1.0, 1.0], [1.0, 5.0]]])
    np.testing.assert_allclose(align_scale(prediction, TARGET), prediction * 47 / 28)
    np.testing.assert_allclose(align_median(prediction, TARGET), prediction * 3)
    np.testing.assert_array_equal(align_none(prediction, TARGET), prediction)
    np.testing.assert_allclose(align_scale(TARGET / 7, TARGET), TARGET)
    valid = np.array([[[True, True], [True, False]]])
    np.testing.assert_allclose(align_scale(prediction, TARGET, valid), prediction * 7 / 3)
    assert set(ALIGNMENTS) == set(get_args(Alignment))


def test_a_scale_needs_something_to_scale() -> None:
    with pytest.raises(DepthError, match=r"the median of the predicted depth is -2; .* by scale_shift"):
        align_median(np.full_like(TARGET, -2), TARGET)
    np.testing.assert_array_equal(align_scale(np.zeros_like(TARGET), TARGET), 0)


def test_a_ceiling_lowers_what_lies_above_the_cap() -> None:
    prediction = TARGET.copy()
    prediction[0, 1, 1] = 30
    assert depth_metrics(prediction, TARGET, ceiling=10)["abs_rel"].item() == pytest.approx(0.25 / 4)
