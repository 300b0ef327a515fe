"""Distances between two sets of images by their features: Frechet and kernel distance, precision and recall.

Everything is float64 numpy. Features are [n, d], one row per image.

Sources: Heusel et al., 2017, arXiv:1706.08500 (Frechet distance); Binkowski et al., 2018, arXiv:1801.01401 (kernel
distance); Kynkaanniemi et al., 2019, arXiv:1904.06991 (precision and recall); Chan et al., 1983 (merging moments).

torchmetrics has the first two, as modules that take images and hold their own network. They are not used here, because
its Frechet distance sums raw second moments (which cancel when features are far from zero) and merges inside a
torch.distributed group only, and its kernel distance draws random subsets without a seed of its own. The tests compare
both with these functions on equal features.
"""

from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

Array = np.ndarray
CHUNK_ROWS = 1024


class StatisticsError(ValueError):
    """A statistic cannot be computed from the features; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureMoments:
    """Count, mean and scatter of a set of features; merging the moments of parts gives those of the whole set."""

    count: int
    mean: Array
    """[d]."""
    scatter: Array
    """[d, d]: the sum of the outer products of the centred rows."""

    @classmethod
    def of(cls, features: Array, counts: Array | None = None) -> "FeatureMoments":
        """Moments of features [n, d], each counted `counts` [n] times (default once)."""
        features = check_features(features)
        if counts is None:
            mean = features.mean(0)
            centred = features - mean
            return cls(count=len(features), mean=mean, scatter=centred.T @ centred)
        total = int(counts.sum())
        mean = counts @ features / total
        centred = features - mean
        return cls(count=total, mean=mean, scatter=(centred * counts[:, None]).T @ centred)

    @classmethod
    def none(cls, dimensions: int) -> "FeatureMoments":
        """Moments of the empty set, from which merging starts."""
        return cls(count=0, mean=np.zeros(dimensions), scatter=np.zeros((dimensions, dimensions)))

    def merge(self, other: "FeatureMoments") -> "FeatureMoments":
        """Moments of the union of both sets.

        Raises:
            StatisticsError: the features have different sizes.
        """
        if self.mean.shape != other.mean.shape:
            raise StatisticsError(
                f"features of {len(self.mean)} and {len(other.mean)} dimensions cannot be merged. Use one network."
            )
        if not self.count or not other.count:
            return other if not self.count else self
        count = self.count + other.count
        step = other.mean - self.mean
        between = np.outer(step, step) * (self.count * other.count / count)
        return FeatureMoments(
            count=count,
            mean=self.mean + step * (other.count / count),
            scatter=self.scatter + other.scatter + between,
        )

    @property
    def covariance(self) -> Array:
        """Unbiased covariance, [d, d].

        Raises:
            StatisticsError: fewer than two images.
        """
        if self.count < 2:
            raise StatisticsError(f"a covariance needs at least 2 images, got {self.count}. Give more.")
        return self.scatter / (self.count - 1)


def check_features(features: Array) -> Array:
    """The features as float64 [n, d].

    Raises:
        StatisticsError: the shape is wrong, there are no rows, or a value is not finite.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or not len(features):
        raise StatisticsError(f"features have the shape {features.shape}; they must be [images, dimensions].")
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        raise StatisticsError(f"features of images {bad[:5].tolist()} are not finite. Check the feature network.")
    return features


@dataclass(frozen=True, kw_only=True, eq=False)
class FrechetReference:
    """One of the two sets of a Frechet distance, with the symmetric root of its covariance: half of the work."""

    mean: Array
    trace: float
    root: Array
    """[d, d]."""

    @classmethod
    def of(cls, moments: FeatureMoments) -> "FrechetReference":
        """Raises StatisticsError for fewer than two images."""
        covariance = moments.covariance
        values, vectors = np.linalg.eigh(covariance)
        root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
        return cls(mean=moments.mean, trace=float(np.trace(covariance)), root=root)

    def distance(self, moments: FeatureMoments) -> float:
        """Squared 2-Wasserstein distance of the two Gaussians with these moments.

        Biased upward by the sampling error of the covariances, about as d / count: compare equal counts only.

        Raises:
            StatisticsError: fewer than two images.
        """
        other = moments.covariance
        # The trace of (a b)^(1/2), through the symmetric root of a, so that all eigenvalues stay real despite rounding.
        mixed = np.sqrt(np.linalg.eigvalsh(self.root @ other @ self.root).clip(0)).sum()
        return float(np.square(self.mean - moments.mean).sum() + self.trace + np.trace(other) - 2 * mixed)


def frechet_distance(first: FeatureMoments, second: FeatureMoments) -> float:
    """`FrechetReference.distance` of two sets."""
    return FrechetReference.of(first).distance(second)


class KernelDistance:
    """Squared maximum mean discrepancy under the kernel (x.y / d + 1)^3, unbiased; it can be below 0.

    Holds the kernel of all pairs, so memory grows with the square of the number of images.
    """

    def __init__(self, first: Array, second: Array) -> None:
        first, second = check_features(first), check_features(second)
        self._within = (_kernel(first, first), _kernel(second, second))
        self._between = _kernel(first, second)

    def __call__(self, counts: tuple[Array, Array] | None = None) -> float:
        """The distance; with `counts` ([n], [m]), the distance of the resampled sets.

        An image that was drawn twice is not paired with itself, which would add the kernel's diagonal that the unbiased
        estimate omits.
        """
        if counts is None:
            counts = np.ones(self._between.shape[0]), np.ones(self._between.shape[1])
        within = 0.0
        for kernel, each in zip(self._within, counts, strict=True):
            drawn = each.astype(np.float64)
            pairs = drawn.sum() ** 2 - np.square(drawn).sum()
            if pairs <= 0:
                raise StatisticsError("a kernel distance needs at least 2 different images on each side. Give more.")
            within += (drawn @ kernel @ drawn - np.square(drawn) @ np.diagonal(kernel)) / pairs
        between = counts[0] @ self._between @ counts[1] / (counts[0].sum() * counts[1].sum())
        return float(within - 2 * between)


def _kernel(first: Array, second: Array) -> Array:
    return (first @ second.T / first.shape[1] + 1) ** 3


def neighbour_radii(features: Array, k: int) -> Array:
    """Distance [n] from each row to its k-th nearest other row.

    Raises:
        StatisticsError: there are k rows or fewer.
    """
    features = check_features(features)
    if len(features) <= k:
        raise StatisticsError(f"{len(features)} images have no neighbour number {k}. Give more images, or a smaller k.")
    # Position 0 of each sorted row is the image itself, at distance 0.
    parts = [np.partition(cdist(chunk, features), k, axis=1)[:, k] for chunk in _chunks(features)]
    return np.concatenate(parts)


def inside(points: Array, features: Array, radii: Array) -> Array:
    """Bool [n]: whether each point lies in the union of the balls around `features` with `radii`."""
    parts = [(cdist(chunk, features) <= radii).any(1) for chunk in _chunks(check_features(points))]
    return np.concatenate(parts)


def precision_recall(real: Array, made: Array, *, k: int = 3) -> tuple[Array, Array]:
    """Bool [generated]: whether each generated image is within the real ones; bool [real]: whether each real image is
    covered.

    Their means are precision and recall.
    """
    return inside(made, real, neighbour_radii(real, k)), inside(real, made, neighbour_radii(made, k))


def _chunks(features: Array) -> list[Array]:
    return [features[start : start + CHUNK_ROWS] for start in range(0, len(features), CHUNK_ROWS)]


def normalised_distances(first: Array, second: Array) -> Array:
    """Squared distance [n] between corresponding rows, normalised to length 1; from 0 (same direction) to 4.

    Raises:
        StatisticsError: a row is all zeros, or the shapes differ.
    """
    first, second = check_features(first), check_features(second)
    if first.shape != second.shape:
        raise StatisticsError(f"features of shapes {first.shape} and {second.shape} cannot be paired. Pair the rows.")
    lengths = [np.linalg.norm(each, axis=1, keepdims=True) for each in (first, second)]
    if not min(length.min() for length in lengths):
        raise StatisticsError("an image has features of length 0, which have no direction. Check the network.")
    return np.square(first / lengths[0] - second / lengths[1]).sum(1)
