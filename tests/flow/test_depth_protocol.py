"""Which pixels of the truth count, and where fitted maps are cut off, on pixels worked out by hand."""

import numpy as np
import pytest

from d2f_core.flow.depth.config import DepthEvaluationError, EvaluateDepthConfig
from d2f_core.flow.depth.errors import counted, depth_errors, placed
from d2f_core.flow.depth.protocol import Protocol


@pytest.mark.parametrize(
    ("mask", "shape", "window"),
    [
        # 0.40810811 * 375 = 153.04, 0.99189189 * 375 = 371.96, 0.03594771 * 1242 = 44.65, 0.96405229 * 1242 = 1197.35
        ("garg", (375, 1242), (153, 371, 44, 1197)),
        # 0.3324324 * 375 = 124.66, 0.91351351 * 375 = 342.57
        ("eigen", (375, 1242), (124, 342, 44, 1197)),
        ("garg", (370, 1226), (151, 366, 44, 1181)),
        ("nyu_eigen", (480, 640), (45, 471, 41, 601)),
        ("none", (3, 5), (0, 3, 0, 5)),
    ],
)
def test_a_mask_counts_the_published_pixels_and_no_other(mask, shape, window) -> None:
    kept = np.isfinite(counted(np.ones(shape, np.float32), Protocol(mask=mask)))
    rows, columns = np.flatnonzero(kept.any(1)), np.flatnonzero(kept.any(0))
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == window
    assert kept.sum() == (window[1] - window[0]) * (window[3] - window[2])


def test_truth_counts_between_the_limits_and_fitted_maps_are_clamped_to_them() -> None:
    truth = np.array([[1e-3, 0.5, 2.0], [4.0, 10.0, 30.0]], np.float32)
    capped = Protocol(alignment="none", max_depth=10.0)
    np.testing.assert_array_equal(np.isfinite(counted(truth, capped)), [[False, True, True], [True, False, False]])
    np.testing.assert_array_equal(np.isfinite(counted(truth, Protocol(min_depth=1.0))), [[0, 0, 1], [1, 1, 1]])
    # Of 0.5, 2 and 4 metres, 20 is lowered to 10: (0 + 0 + 6 / 4) / 3; and -3 is raised to 0.001: 1.999 / 2 / 3.
    far, near = truth.copy(), truth.copy()
    far[1, 0], near[0, 2] = 20, -3
    assert depth_errors(far, counted(truth, capped), capped)["abs_rel"] == pytest.approx(0.5)
    assert depth_errors(near, counted(truth, capped), capped)["abs_rel"] == pytest.approx(1.999 / 6)
    assert depth_errors(far, counted(truth, capped), Protocol(alignment="none"))["abs_rel"] == pytest.approx(4 / 3)


def test_pixels_beyond_the_cap_do_not_pull_the_fit() -> None:
    truth = np.full((4, 4), 5.0, np.float32)
    truth[0] = 2.0
    prediction = truth.copy()
    truth[3, 3] = 500.0
    capped = Protocol(max_depth=80.0)
    assert depth_errors(prediction, counted(truth, capped), capped)["abs_rel"] < 1e-6
    assert depth_errors(prediction, counted(truth, Protocol()))["abs_rel"] > 1


def test_whole_maps_and_those_of_the_centre_square_are_compared_on_the_square() -> None:
    truth = np.add.outer(np.linspace(2, 4, 8), np.linspace(0, 3, 12)).astype(np.float32)
    both = Protocol(square=True)
    kept = counted(truth, both)
    assert kept.shape == (8, 8) and kept[0, 0] == truth[0, 2]
    whole = placed(truth, truth.shape, of_square=False, protocol=both)
    squared = placed(truth[:, 2:10], truth.shape, of_square=True, protocol=both)
    np.testing.assert_array_equal(whole, squared)
    assert placed(truth[::2, ::2], truth.shape, of_square=False, protocol=Protocol()).shape == truth.shape
    # The mask is of the whole truth, before its square is cut out.
    garg = counted(truth, Protocol(square=True, mask="garg"))
    np.testing.assert_array_equal(np.isfinite(garg).any(1), [0, 0, 0, 1, 1, 1, 1, 0])


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(DepthEvaluationError, match=r"mask='nyu_eigen' is made for truth of 640x480 px, not 6x4\. Use"):
        counted(np.ones((4, 6), np.float32), Protocol(mask="nyu_eigen"))
    with pytest.raises(DepthEvaluationError, match=r"min_depth=90 must lie above 0 and below max_depth=80.*metres"):
        EvaluateDepthConfig(min_depth=90, max_depth=80)


def test_a_line_says_how_was_measured() -> None:
    config = EvaluateDepthConfig(alignment="median", mask="garg", max_depth=80)
    assert Protocol.of(config, square=False).words == ("alignment median, truth 0.001 to 80 m, mask garg, whole images")
    found = Protocol.of(EvaluateDepthConfig(), square=True).to_json()
    assert found["protocol"] == "alignment scale_shift, truth above 0.001 m, no cap, mask none, centre squares"
    assert found["alignment"] == "scale and shift per image, least squares on the valid pixels"
