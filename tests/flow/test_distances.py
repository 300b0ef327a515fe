"""Statistics of features: exact under merging, equal to torchmetrics', and right on closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from d2f_core.evaluation.bootstrap import bootstrap_counts, percentile_interval
from d2f_core.flow.evaluate.config import MeasureConfig
from d2f_core.flow.evaluate.distances import (
    FeatureMoments,
    KernelDistance,
    StatisticsError,
    frechet_distance,
    inside,
    neighbour_radii,
    normalised_distances,
    precision_recall,
)
from d2f_core.flow.evaluate.image_metrics import (
    FeaturePart,
    failed_share,
    gather,
    measure,
    model_distance,
    noise_floor,
)

GENERATOR = np.random.default_rng(0)


def drawn(rows: int, width: int = 6, mean: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (rows, width))


@settings(max_examples=50)
@given(
    cuts=st.lists(st.integers(0, 200), max_size=12), offset=st.sampled_from([0.0, 10.0, 1e4]), seed=st.integers(0, 99)
)
def test_merging_any_split_in_any_order_equals_one_process(cuts: list[int], offset: float, seed: int) -> None:
    features = drawn(200, mean=offset, seed=seed)
    parts = [part for part in np.split(features, sorted(cuts)) if len(part)]
    parts = [parts[place] for place in np.random.default_rng(seed).permutation(len(parts))]
    merged = FeatureMoments.none(6)
    for part in parts:
        merged = merged.merge(FeatureMoments.of(part))
    whole = FeatureMoments.of(features)
    assert merged.count == 200
    np.testing.assert_allclose(merged.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, atol=1e-8 * np.abs(whole.scatter).max())
    np.testing.assert_allclose(merged.covariance, np.cov(features.T), rtol=1e-8, atol=1e-8)


def test_counts_are_repeated_rows() -> None:
    features, counts = drawn(30), GENERATOR.integers(0, 4, 30)
    repeated, counted = FeatureMoments.of(np.repeat(features, counts, axis=0)), FeatureMoments.of(features, counts)
    assert repeated.count == counted.count
    np.testing.assert_allclose(repeated.mean, counted.mean, atol=1e-12)
    np.testing.assert_allclose(repeated.scatter, counted.scatter, atol=1e-10)


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    def gaussian(mean: list[float], std: list[float]) -> FeatureMoments:
        return FeatureMoments(count=11, mean=np.array(mean), scatter=np.diag(np.square(std)) * 10)

    first, second = gaussian([0, 0, 0], [1, 2, 3]), gaussian([1, 0, 2], [2, 2, 0])
    assert frechet_distance(first, second) == pytest.approx((1 + 4) + (1 + 0 + 9), abs=1e-12)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


class Flat(nn.Module):
    """Pixels as features, so that torchmetrics can be given features."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float()


def as_images(features: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(features.astype(np.uint8)).reshape(-1, 3, 2, 2)


def byte_features(rows: int, low: int, high: int) -> np.ndarray:
    return GENERATOR.integers(low, high, (rows, 12)).astype(np.float64)


def test_frechet_distance_equals_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, made = byte_features(90, 0, 200), byte_features(70, 40, 256)
    theirs = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    theirs.update(as_images(real), real=True)
    theirs.update(as_images(made), real=False)
    ours = frechet_distance(FeatureMoments.of(real), FeatureMoments.of(made))
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_kernel_distance_equals_torchmetrics() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    real, made = byte_features(40, 0, 200), byte_features(40, 40, 256)
    # One subset of all images: theirs then draws nothing.
    theirs = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=40)
    theirs.update(as_images(real), real=True)
    theirs.update(as_images(made), real=False)
    mean, _ = theirs.compute()
    assert KernelDistance(real, made)() == pytest.approx(mean.item(), rel=1e-5)


def test_kernel_distance_of_two_points_each_is_the_closed_form() -> None:
    first, second = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    # Kernel (xy + 1)^3. Within: k(0,1) = 1 and k(1,2) = 27; between: the mean of k(0,1), k(0,2), k(1,1), k(1,2).
    assert KernelDistance(first, second)() == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4, abs=1e-12)


def test_a_resampled_kernel_distance_never_pairs_an_image_with_itself() -> None:
    first, second = drawn(9), drawn(7, seed=1)
    counts = np.array([2, 0, 1, 1, 3, 0, 1, 0, 1]), np.array([1, 1, 2, 0, 2, 1, 0])

    def mean_of_pairs(features: np.ndarray, times: np.ndarray) -> float:
        names = np.repeat(np.arange(len(features)), times)
        kernel = (features @ features.T / 6 + 1) ** 3
        return float(np.mean([kernel[i, j] for i in names for j in names if i != j]))

    kernel = (np.repeat(first, counts[0], 0) @ np.repeat(second, counts[1], 0).T / 6 + 1) ** 3
    # The pairs left out are those of one image with itself, its other copies included: so is their share of the weight.
    drawn_counts = counts[0].astype(float)
    assert drawn_counts.sum() ** 2 - np.square(drawn_counts).sum() == sum(
        i != j for i in np.repeat(np.arange(9), counts[0]) for j in np.repeat(np.arange(9), counts[0])
    )
    expected = mean_of_pairs(first, counts[0]) + mean_of_pairs(second, counts[1]) - 2 * kernel.mean()
    assert KernelDistance(first, second)(counts) == pytest.approx(expected, abs=1e-10)


def test_precision_and_recall_of_points_on_a_line() -> None:
    real, made = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([[0.5], [2.5], [10.0], [10.5]])
    np.testing.assert_allclose(neighbour_radii(real, 1), [1, 1, 1, 1])
    np.testing.assert_allclose(neighbour_radii(made, 1), [2, 2, 0.5, 0.5])
    like_real, covered = precision_recall(real, made, k=1)
    assert like_real.tolist() == [True, True, False, False]
    assert covered.tolist() == [True, True, True, True]
    np.testing.assert_array_equal(inside(np.array([[4.0], [4.1]]), real, neighbour_radii(real, 1)), [True, False])


def test_normalised_distance_sees_directions_alone() -> None:
    first, second = np.array([[2.0, 0], [0, 3], [1, 0]]), np.array([[5.0, 0], [7, 0], [-1, 0]])
    np.testing.assert_allclose(normalised_distances(first, second), [0, 2, 4])


def test_the_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = drawn(400, 1)[:, 0]
    replicates = bootstrap_counts(400, 2000, seed=3) @ values / 400
    low, high = percentile_interval(values.mean(), replicates)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    assert (bootstrap_counts(400, 3, seed=3) == bootstrap_counts(400, 3, seed=3)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FeatureMoments.of(np.ones((0, 3))), r"shape \(0, 3\)"),
        (lambda: FeatureMoments.of(np.ones(3)), r"shape \(3,\)"),
        (lambda: FeatureMoments.of(np.array([[1.0], [np.nan]])), r"images \[1\] are not finite"),
        (lambda: FeatureMoments.of(np.ones((1, 3))).covariance, "at least 2 images, got 1"),
        (lambda: FeatureMoments.of(drawn(3, 2)).merge(FeatureMoments.of(drawn(3, 4))), "2 and 4 dimensions"),
        (lambda: neighbour_radii(drawn(3), 3), "3 images have no neighbour number 3"),
        (lambda: normalised_distances(np.zeros((1, 2)), np.ones((1, 2))), "length 0"),
        (lambda: normalised_distances(drawn(3), drawn(4)), "cannot be paired"),
    ],
)
def test_what_has_no_statistic_is_refused(call, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        call()


CONFIG = MeasureConfig(replicates=40, pairwise_rows=50)


def parts_of(features: np.ndarray, sizes: list[int], missing: tuple[int, ...] = ()) -> list[FeaturePart]:
    rows = np.setdiff1d(np.arange(len(features)), missing)
    return [
        FeaturePart(part, features[part], features[part, 0]) for part in np.split(rows, np.cumsum(sizes)) if len(part)
    ]


def gathered(features: np.ndarray, sizes: list[int] = (), draws: int = 1, missing: tuple[int, ...] = ()):
    parts = parts_of(features, list(sizes), missing)
    return gather(parts, total=len(features), dimensions=features.shape[1], config=CONFIG, draws=draws)


def test_values_and_intervals_do_not_depend_on_the_split_into_parts() -> None:
    real, made = gathered(drawn(120), draws=2), drawn(100, mean=0.3, seed=1)
    one, many = measure(real, gathered(made), CONFIG), measure(real, gathered(made, [7, 40, 13]), CONFIG)
    assert set(one) == {"frechet", "kernel", "precision", "recall", "clip_score"}
    for name, estimate in one.items():
        assert estimate.value == pytest.approx(many[name].value, abs=1e-10)
        np.testing.assert_allclose(estimate.replicates, many[name].replicates, atol=1e-8)
        assert estimate.low <= estimate.high


def test_differences_of_models_are_paired() -> None:
    """Nearly equal models: each value is uncertain, their difference is not."""
    real, made = gathered(drawn(150), draws=2), drawn(120, mean=0.5, seed=1)
    first, second = measure(real, gathered(made), CONFIG), measure(real, gathered(made + 0.001), CONFIG)
    spread = (first["frechet"].replicates - second["frechet"].replicates).std()
    assert spread < 0.01 * first["frechet"].replicates.std()


def test_images_without_a_counterpart_are_left_out_and_the_others_stay_paired() -> None:
    real, features = gathered(drawn(60), draws=2), drawn(50, mean=0.5, seed=1)
    whole, holed = gathered(features), gathered(features, missing=(3, 20))
    found = measure(real, holed, CONFIG)
    assert found["frechet"].count == 48
    apart = model_distance(whole, holed)
    assert apart is not None and apart.value == pytest.approx(0, abs=1e-15) and apart.count == 48
    assert not measure(real, gathered(features, missing=tuple(range(48))), CONFIG)


def test_models_without_an_image_in_common_have_no_distance_and_chosen_rows_alone_count() -> None:
    parts = [FeaturePart(np.arange(start, start + 10), drawn(10, seed=start), None) for start in (0, 10)]
    config = MeasureConfig(replicates=20)
    first, second = (
        gather(parts, total=20, dimensions=6, config=config, only=(np.arange(20) < 10) == left)
        for left in (True, False)
    )
    assert (first.count, first.kept.rows.tolist()) == (10, list(range(10)))
    assert second.kept.rows.tolist() == list(range(10, 20)) and model_distance(first, second) is None
    whole = model_distance(first, gather(parts, total=20, dimensions=6, config=config))
    assert whole is not None and whole.count == 10 and whole.value == 0


def test_a_distance_of_one_image_is_refused() -> None:
    kernel = KernelDistance(drawn(3), drawn(3, seed=1))
    once = np.array([0, 1, 0])
    with pytest.raises(StatisticsError, match=r"needs at least 2 different images on each side\. Give more"):
        kernel((once, np.ones(3, int)))


@pytest.mark.parametrize("usable", [1, 4, 6, 8, 10, 30])
def test_a_model_that_fails_most_images_is_measured_or_not_but_ends_no_evaluation(usable: int) -> None:
    """Of few images some resampled set holds a single one, however often it was drawn."""
    config, found = MeasureConfig(), []
    real = gather([FeaturePart(np.arange(100), drawn(100), None)], total=100, dimensions=6, config=config)
    for draws in range(12):
        part = FeaturePart(np.arange(100 - usable, 100), drawn(usable, seed=1), None)
        made = gather([part], total=100, dimensions=6, config=config, draws=draws)
        found.append(measure(real, made, config))
    measured = sum("kernel" in each for each in found)
    assert {1: measured == 0, 4: measured == 0, 30: measured == 12}.get(usable, True)
    few = gather([FeaturePart(np.arange(4), drawn(4), None)], total=4, dimensions=6, config=config)
    assert not measure(few, real, config), "nor does a reference of few images"


def test_sets_with_the_same_rows_share_their_draws_wherever_these_lie() -> None:
    """Models that failed on some prompts are compared on those that all made, in pairs."""
    rows = np.array([3, 5, 8, 20, 21, 40, 41, 42, 60, 61])
    only = np.isin(np.arange(100), rows)
    made = [
        gather([FeaturePart(rows, drawn(10, seed=seed), None)], total=100, dimensions=6, config=CONFIG, only=only)
        for seed in (1, 2)
    ]
    assert (made[0].kept_draws == made[1].kept_draws).all() and made[0].kept_draws.sum(1).tolist() == [10] * 40


def test_the_share_of_failures_is_exact() -> None:
    found = failed_share(np.arange(200) != 7)
    assert (found.value, found.low, found.high, found.count) == (pytest.approx(0.005), found.value, found.value, 200)


@pytest.mark.parametrize(("total", "made"), [(400, 400), (400, 100), (120, 480)])
def test_the_floor_is_what_a_fresh_set_would_measure(total: int, made: int) -> None:
    """Two halves alone would be 2, 0.8 and 1.6 times as far apart."""
    floors, fresh = [], []
    for seed in range(12):
        features = drawn(total + made, seed=seed)
        real, new = features[:total], features[total:]
        part = FeaturePart(np.arange(total), real, None)
        floors.append(noise_floor([part], total=total, made=made, config=MeasureConfig())["frechet"].value)
        fresh.append(frechet_distance(FeatureMoments.of(real), FeatureMoments.of(new)))
    error = np.std(fresh) / len(fresh) ** 0.5
    assert np.mean(floors) == pytest.approx(np.mean(fresh), abs=3 * error + 0.02 * np.mean(fresh))
    assert error < 0.1 * np.mean(fresh)


def test_the_floor_of_the_kernel_distance_is_nought_and_few_images_have_none() -> None:
    part = FeaturePart(np.arange(200), drawn(200), None)
    kernel = noise_floor([part], total=200, made=200, config=MeasureConfig())["kernel"]
    assert kernel.low < 0 < kernel.high and abs(kernel.value) < 0.1
    few = FeaturePart(np.arange(7), drawn(7), None)
    assert noise_floor([few], total=7, made=200, config=MeasureConfig()) == {}


def test_a_set_without_an_image_has_no_values_and_ends_nothing() -> None:
    part = FeaturePart(np.arange(60), drawn(60), None)
    nothing = gather([part], total=60, dimensions=6, config=CONFIG, only=np.zeros(60, bool))
    assert nothing.count == 0 and measure(gathered(drawn(60)), nothing, CONFIG) == {}
    assert model_distance(nothing, nothing) is None
    assert noise_floor([part], total=60, made=0, config=MeasureConfig()) == {}
