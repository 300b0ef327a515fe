"""FID, KID and CMMD as they are published, of sets of any size in bounded memory: plain values, without intervals.

| name | features                                | estimate                                                            |
|------|-----------------------------------------|---------------------------------------------------------------------|
| FID  | Inception-v3's 2,048, of every image    | Frechet distance of Gaussians; biased upward by about d / count     |
| KID  | the same, of images chosen at random    | all pairs, unbiased; kernel (x.y / d + 1)^3; not times 1000         |
| CMMD | CLIP's, at length 1, of the same images | all pairs, those of an image with itself included, as the authors'  |
|      |                                         | code has it (biased); kernel exp(-(x - y)^2 / 200); times 1000      |

Features come in parts, which are summed in float64, a block of rows at a time. No matrix of all pairs is held. FID is
`FrechetReference.of(real.moments).distance(made.moments)`; one reference serves many models.

Sources: Heusel et al., 2017, arXiv:1706.08500 (FID); Binkowski et al., 2018, arXiv:1801.01401 (KID); Jayasumana et al.,
2024, arXiv:2401.09603 (CMMD).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from d2f_core.flow.evaluate.distances import FeatureMoments, StatisticsError, check_features

Array = np.ndarray
MOMENT_ROWS, PAIR_ROWS = 2048, 1024
"""Rows that are in float64 at a time, for sums and for pairs: 32 and 16 MB at 2,048 features."""
PAIRED_ROWS = 10_000
"""Most images of a set for the distances over all pairs. More narrow the estimate little, and cost their square."""
CHOICE_SEED = 0
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


class PlainPart(NamedTuple):
    """Features of some of a set's images."""

    rows: Array
    """int64 [n]: positions of the images in the whole set."""
    features: Array
    """[n, d]."""
    clip_features: Array | None = None
    """CLIP's embeddings, [n, e]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainSet:
    """What the distances need of a set of images."""

    moments: FeatureMoments
    """Of the features of all images."""
    features: Array
    """float32 [chosen, d]: those of the images that were chosen at random, in the set's order."""
    clip_features: Array | None
    """float32 [chosen, e]: CLIP's embeddings of the same images."""


def gather_plain(parts: Iterable[PlainPart], *, total: int, width: int, rows: int = PAIRED_ROWS) -> PlainSet:
    """Read a set part by part; the split into parts and their order affect only rounding.

    Args:
        total: images in the set; those that failed have no features and are in no part.
        width: features per image.
        rows: most images that are chosen. Which are depends on `total` and `rows` alone.

    Raises:
        StatisticsError: features have another width, or a value is not finite.
    """
    choice = _Choice(total, rows)
    moments, features, clip_features = FeatureMoments.none(width), choice.array(width), None
    for part in parts:
        for block in _blocks(part.features, MOMENT_ROWS):
            moments = moments.merge(FeatureMoments.of(block))
        choice.keep(part.rows, part.features, features)
        if part.clip_features is not None:
            clip_features = choice.array(part.clip_features.shape[1]) if clip_features is None else clip_features
            choice.keep(part.rows, part.clip_features, clip_features)
    return PlainSet(
        moments=moments,
        features=features[choice.seen],
        clip_features=None if clip_features is None else clip_features[choice.seen],
    )


class _Choice:
    """The random choice of a set's images."""

    def __init__(self, total: int, rows: int) -> None:
        self.count = min(total, rows)
        self._place = np.full(total, -1)
        """Of each image, its place among those chosen, or -1."""
        drawn = np.random.Generator(np.random.Philox(CHOICE_SEED)).permutation(total)[:rows]
        self._place[np.sort(drawn)] = np.arange(self.count)
        self.seen = np.zeros(self.count, bool)

    def array(self, width: int) -> Array:
        return np.empty((self.count, width), np.float32)

    def keep(self, rows: Array, features: Array, into: Array) -> None:
        """Copy the features of the chosen ones among some images."""
        places = self._place[rows]
        into[places[places >= 0]] = features[places >= 0]
        self.seen[places[places >= 0]] = True


def kid(first: Array, second: Array) -> float:
    """Kernel distance of features [n, d] and [m, d]; it can be below 0. torchmetrics' subsets estimate the same value.

    Raises:
        StatisticsError: fewer than two images on a side, different widths, or a value is not finite.
    """
    first, second = _checked(first, second)
    within = sum(_mean_within(each, _cubic, own=False) for each in (first, second))
    return within - 2 * _mean_between(first, second, _cubic)


def cmmd(first: Array, second: Array) -> float:
    """CMMD of CLIP's embeddings of images, [n, d] and [m, d], of any length but 0.

    Raises:
        StatisticsError: fewer than two images on a side, different widths, an embedding of zeros, or a value is not
            finite.
    """
    first, second = (_at_length_1(each) for each in _checked(first, second))
    within = sum(_mean_within(each, _gaussian, own=True) for each in (first, second))
    return CMMD_SCALE * (within - 2 * _mean_between(first, second, _gaussian))


def _checked(first: Array, second: Array) -> tuple[Array, Array]:
    for features in (first, second):
        for block in _blocks(features, PAIR_ROWS):
            check_features(block)
        if len(features) < 2:
            raise StatisticsError(f"a distance over all pairs needs at least 2 images, got {len(features)}. Give more.")
    if first.shape[1] != second.shape[1]:
        raise StatisticsError(
            f"features of {first.shape[1]} and {second.shape[1]} dimensions have no distance. Use one network."
        )
    return first, second


def _at_length_1(features: Array) -> Array:
    lengths = np.sqrt(np.square(features, dtype=np.float64).sum(1, keepdims=True))
    if not lengths.all():
        raise StatisticsError("an image has an embedding of length 0, which has no direction. Check the network.")
    return features / lengths


Kernel = Callable[[Array, int], Array]
"""From products of rows and their width to the kernel's values, in place."""


def _cubic(products: Array, width: int) -> Array:
    products /= width
    products += 1
    return products**3


def _gaussian(products: Array, width: int) -> Array:
    """|x - y|^2 is 2 - 2 x.y for rows of length 1."""
    del width
    products -= 1
    products /= CMMD_SIGMA**2
    return np.exp(products, out=products)


def _mean_within(features: Array, kernel: Kernel, *, own: bool) -> float:
    """Mean of the kernel over pairs of rows, `own`: those of a row with itself included."""
    total, diagonal, count = 0.0, 0.0, len(features)
    blocks = list(_blocks(features, PAIR_ROWS))
    for number, one in enumerate(blocks):
        values = _kernel(one, one, kernel)
        diagonal += float(np.trace(values))
        total += float(values.sum()) + sum(2 * float(_kernel(one, each, kernel).sum()) for each in blocks[number + 1 :])
    return total / count**2 if own else (total - diagonal) / (count * (count - 1))


def _mean_between(first: Array, second: Array, kernel: Kernel) -> float:
    pairs = ((one, other) for one in _blocks(first, PAIR_ROWS) for other in _blocks(second, PAIR_ROWS))
    return sum(float(_kernel(*pair, kernel).sum()) for pair in pairs) / (len(first) * len(second))


def _kernel(first: Array, second: Array, kernel: Kernel) -> Array:
    return kernel(first.astype(np.float64) @ second.astype(np.float64).T, first.shape[1])


def _blocks(features: Array, rows: int) -> Iterator[Array]:
    return (features[start : start + rows] for start in range(0, len(features), rows))
