"""FID, KID and CMMD: equal to torchmetrics' and to the published formulas, from any parts, in bounded memory."""

import numpy as np
import pytest
import torch
from torch import nn

from d2f_core.flow.evaluate import plain_distances
from d2f_core.flow.evaluate.distances import FeatureMoments, FrechetReference, StatisticsError, frechet_distance
from d2f_core.flow.evaluate.plain_distances import PlainPart, PlainSet, cmmd, gather_plain, kid

WIDTH = 48


class Given(nn.Module):
    """Ready features in place of images, for torchmetrics."""

    num_features = WIDTH

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.flatten(1)


def as_images(features: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(features).reshape(-1, 3, 4, 4)


def drawn(rows: int, mean: float = 0.0, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    """float32 features with correlated columns of different spread."""
    draw = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH)
    spread = np.linspace(0.2, 2, WIDTH)
    return ((draw.normal(size=(rows, WIDTH)) * (1 + shift)) @ mix * spread + mean + shift).astype(np.float32)


def parts_of(features: np.ndarray, sizes: list[int], *, clip: bool = False) -> list[PlainPart]:
    rows = np.split(np.arange(len(features)), np.cumsum(sizes))
    return [PlainPart(each, features[each], features[each, :5] if clip else None) for each in rows]


def gathered(features: np.ndarray, sizes: list[int] | None = None, rows: int = 10_000) -> PlainSet:
    return gather_plain(parts_of(features, sizes or [7]), total=len(features), width=WIDTH, rows=rows)


@pytest.mark.parametrize("mean", [0.0, 30.0, 300.0])
def test_fid_equals_torchmetrics_also_far_from_zero(mean: float) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, made = drawn(400, mean), drawn(300, mean, shift=0.1, seed=1)
    theirs = FrechetInceptionDistance(feature=Given(), input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    theirs.update(as_images(real).double(), real=True)
    theirs.update(as_images(made).double(), real=False)
    reference = FrechetReference.of(gathered(real, [100, 50]).moments)
    ours = reference.distance(gathered(made, [1, 200]).moments)
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-3)
    assert ours == pytest.approx(frechet_distance(FeatureMoments.of(real), FeatureMoments.of(made)), rel=1e-9)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_kid_equals_torchmetrics_also_far_from_zero(mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    monkeypatch.setattr(plain_distances, "PAIR_ROWS", 64)  # several blocks, of which the last is shorter
    real, made = drawn(150, mean), drawn(150, mean, shift=0.1, seed=1)
    theirs = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=150)
    theirs.update(as_images(real).double(), real=True)
    theirs.update(as_images(made).double(), real=False)
    expected = theirs.compute()[0].item()
    assert kid(real, made) == pytest.approx(expected, rel=1e-3)
    assert kid(gathered(real).features, gathered(made, [60, 3]).features) == pytest.approx(expected, rel=1e-3)


def test_kid_is_unbiased_and_of_sets_of_different_sizes() -> None:
    first, second = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0], [0.0]])
    # Kernel (xy + 1)^3. Within: k(0,1) = 1; k(1,2) = 27, k(1,0) = 1, k(2,0) = 1. Between: 1, 1, 1 and 8, 27, 1.
    assert kid(first, second) == pytest.approx(1 + 29 / 3 - 2 * 39 / 6, abs=1e-12)
    halves = [kid(drawn(200, seed=2 * number), drawn(200, seed=2 * number + 1)) for number in range(40)]
    assert abs(np.mean(halves)) < 3 * np.std(halves) / np.sqrt(40) and min(halves) < 0


def test_cmmd_is_the_published_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """The V-statistic of the authors' code: an image is paired with itself too, so it is above 0 and 0 for one set."""
    monkeypatch.setattr(plain_distances, "PAIR_ROWS", 16)
    first, second = drawn(50, 1.0), drawn(37, 1.0, shift=0.4, seed=1)
    x, y = (each / np.linalg.norm(each.astype(np.float64), axis=1, keepdims=True) for each in (first, second))

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-np.square(a[:, None] - b[None]).sum(2) / (2 * 10**2)).mean())

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert expected > 0.1 and cmmd(first, second) == pytest.approx(expected, rel=1e-9)
    assert cmmd(5 * first, second) == pytest.approx(expected, rel=1e-5), "only directions count"
    assert cmmd(first, first) == pytest.approx(0, abs=1e-9)


def test_the_split_into_parts_and_their_order_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_distances, "MOMENT_ROWS", 50)
    features = drawn(330, 1000.0)
    parts = parts_of(features, [3, 120, 11], clip=True)
    one, many = (gather_plain(each, total=330, width=WIDTH, rows=40) for each in (
        parts_of(features, [], clip=True), [parts[place] for place in (2, 0, 3, 1)]
    ))  # fmt: skip
    np.testing.assert_array_equal(one.features, many.features)
    assert one.clip_features is not None and many.clip_features is not None
    np.testing.assert_array_equal(one.clip_features, many.clip_features)
    np.testing.assert_array_equal(one.features[:, :5], one.clip_features)
    assert one.moments.count == many.moments.count == 330
    np.testing.assert_allclose(many.moments.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(many.moments.covariance, np.cov(features.astype(np.float64).T), rtol=1e-6, atol=1e-9)


def test_at_most_so_many_images_are_chosen_and_the_same_ones_of_every_model() -> None:
    rows = np.arange(200, dtype=np.float32)[:, None]
    whole = gather_plain([PlainPart(np.arange(200), rows)], total=200, width=1, rows=50)
    assert len(set(whole.features[:, 0])) == 50 and (np.diff(whole.features[:, 0]) > 0).all()
    assert 60 < whole.features.mean() < 140, "not the first ones"
    failed = int(whole.features[7, 0])
    there = np.setdiff1d(np.arange(200), [failed])
    holed = gather_plain([PlainPart(there, rows[there])], total=200, width=1, rows=50)
    np.testing.assert_array_equal(holed.features, np.delete(whole.features, 7, axis=0))
    assert holed.moments.count == 199 and holed.clip_features is None
    assert len(gather_plain([PlainPart(np.arange(200), rows)], total=200, width=1).features) == 200


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    """Of 200,000 images in parts of 5,000 at most the chosen ones and a few blocks are held."""
    import tracemalloc

    def parts():
        for start in range(0, 200_000, 5_000):
            yield PlainPart(np.arange(start, start + 5_000), np.full((5_000, WIDTH), start, np.float32))

    tracemalloc.start()
    try:
        found = gather_plain(parts(), total=200_000, width=WIDTH, rows=1_000)
        first, second = found.features, found.features + 1
        kid(first, second)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.moments.count == 200_000
    assert peak < 0.6 * 200_000 * WIDTH * 4, "less than the features themselves"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kid(drawn(1), drawn(5)), "at least 2 images, got 1"),
        (lambda: kid(drawn(5), drawn(5)[:, :7]), "of 48 and 7 dimensions have no distance"),
        (lambda: cmmd(np.zeros((3, 4)), np.ones((3, 4))), "embedding of length 0"),
        (lambda: kid(drawn(5), np.full((4, WIDTH), np.nan)), r"images \[0, 1, 2, 3\] are not finite"),
        (lambda: gathered(np.full((4, WIDTH), np.inf, np.float32)), "are not finite"),
        (lambda: gather_plain([PlainPart(np.arange(5), drawn(5))], total=5, width=9), "9 and 48 dimensions"),
        (lambda: FrechetReference.of(FeatureMoments.of(drawn(1))), "at least 2 images, got 1"),
    ],
)
def test_what_has_no_distance_is_refused(call, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        call()
