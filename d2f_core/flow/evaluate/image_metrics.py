"""From features to measured values, in one streaming pass: moments are accumulated, and only the rows that pairwise
metrics sample stay in memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from d2f_core.evaluation.bootstrap import bootstrap_counts
from d2f_core.evaluation.estimates import Estimate
from d2f_core.flow.evaluate.config import MeasureConfig
from d2f_core.flow.evaluate.distances import (
    FeatureMoments,
    KernelDistance,
    frechet_distance,
    normalised_distances,
    precision_recall,
)

MADE_DRAWS, REAL_DRAWS = 1, 2
"""Seeds of the bootstrap: all models share the draws, real images have their own."""


class FeaturePart(NamedTuple):
    """Features of some of a set's images."""

    rows: np.ndarray
    """int64 [n]: positions of the images in the whole set, by which images of one prompt file are paired across
    models."""
    features: np.ndarray
    """float64 [n, d]."""
    caption_scores: np.ndarray | None
    """float64 [n]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """The statistics of a set of images that metrics need."""

    total: int
    """Number of images in the set, including failed ones, which have no features."""
    moments: FeatureMoments
    resampled: tuple[FeatureMoments, ...]
    """Moments of each bootstrap replicate."""
    kept: FeaturePart
    """The images sampled for the pairwise metrics, sorted by row."""
    kept_draws: np.ndarray
    """int64 [replicates, kept]: how often each replicate draws the kept images."""
    caption_scores: np.ndarray
    """float64 [images], or empty."""
    caption_draws: np.ndarray
    """int64 [replicates, images], or empty."""

    @property
    def count(self) -> int:
        return self.moments.count


def gather(
    parts: Iterable[FeaturePart],
    *,
    total: int,
    dimensions: int,
    config: MeasureConfig,
    draws: int = MADE_DRAWS,
    only: np.ndarray | None = None,
) -> ImageSet:
    """Read a set part by part; the split into parts and their order affect only rounding.

    Args:
        total: images in the whole set, failed ones included.
        draws: seed of the resampling.
        only: bool [total]: rows to use; None: all.
    """
    chosen = np.ones(total, bool) if only is None else only
    shuffled = np.random.Generator(np.random.Philox(draws)).permutation(np.flatnonzero(chosen))
    keep = np.zeros(total, bool)
    keep[shuffled[: config.pairwise_rows]] = True
    counts = np.zeros((config.replicates, total), np.int64)
    counts[:, chosen] = bootstrap_counts(int(chosen.sum()), config.replicates, draws)
    moments = FeatureMoments.none(dimensions)
    resampled = [moments] * config.replicates
    kept: list[FeaturePart] = []
    scores: list[tuple[np.ndarray, np.ndarray]] = []
    for part in parts:
        part = _subset(part, chosen[part.rows])
        if not len(part.rows):
            continue
        moments = moments.merge(FeatureMoments.of(part.features))
        for number, drawn in enumerate(counts[:, part.rows]):
            if drawn.any():
                resampled[number] = resampled[number].merge(FeatureMoments.of(part.features, drawn))
        kept.append(_subset(part, keep[part.rows]))
        if part.caption_scores is not None:
            scores.append((part.rows, part.caption_scores))
    pairwise = _sorted(kept, dimensions)
    return ImageSet(
        total=int(chosen.sum()),
        moments=moments,
        resampled=tuple(resampled),
        kept=pairwise,
        kept_draws=counts[:, pairwise.rows],
        caption_scores=np.concatenate([each for _, each in scores]) if scores else np.empty(0),
        caption_draws=counts[:, np.concatenate([rows for rows, _ in scores])] if scores else np.empty((0, 0), np.int64),
    )


def _subset(part: FeaturePart, mask: np.ndarray) -> FeaturePart:
    scores = None if part.caption_scores is None else part.caption_scores[mask]
    return FeaturePart(part.rows[mask], part.features[mask], scores)


def _sorted(parts: list[FeaturePart], dimensions: int) -> FeaturePart:
    rows = np.concatenate([np.empty(0, np.int64), *(part.rows for part in parts)])
    features = np.concatenate([np.empty((0, dimensions)), *(part.features for part in parts)])
    order = np.argsort(rows)
    return FeaturePart(rows[order], features[order], None)


def enough(images: ImageSet, config: MeasureConfig) -> bool:
    """Whether there are enough images for every metric on every replicate."""
    several = (images.kept_draws > 0).sum(1) > 1  # one image drawn twice has no distance within its set
    return len(images.kept.rows) > config.neighbours + 1 and bool(several.all())


def measure(real: ImageSet, made: ImageSet, config: MeasureConfig) -> dict[str, Estimate]:
    """Every metric of a generated set against the real one, by short name; only `failed` if too few images are
    usable.
    """
    found = {"failed": _failed(made)}
    if not all(enough(images, config) for images in (made, real)):
        return found
    value = frechet_distance(made.moments, real.moments)
    pairs = zip(made.resampled, real.resampled, strict=True)
    found["frechet"] = Estimate.of(value, np.array([frechet_distance(*pair) for pair in pairs]), made.count)
    kernel = KernelDistance(made.kept.features, real.kept.features)
    replicates = [kernel(draws) for draws in zip(made.kept_draws, real.kept_draws, strict=True)]
    kept = len(made.kept.rows)
    found["kernel"] = Estimate.of(kernel(), np.array(replicates), kept)
    like_real, covered = precision_recall(real.kept.features, made.kept.features, k=config.neighbours)
    found["precision"] = _share(like_real, made.kept_draws)
    found["recall"] = _share(covered, real.kept_draws)
    if len(made.caption_scores):
        found["clip_score"] = _share(made.caption_scores, made.caption_draws)
    return found


def model_distance(first: ImageSet, second: ImageSet) -> Estimate | None:
    """Mean squared distance of the normalised features of two models' images of the same prompt and noise.

    None when the models have no image in common.
    """
    rows, left, right = np.intersect1d(first.kept.rows, second.kept.rows, return_indices=True)
    if not len(rows):
        return None
    distances = normalised_distances(first.kept.features[left], second.kept.features[right])
    return _share(distances, first.kept_draws[:, left])


def _share(values: np.ndarray, draws: np.ndarray) -> Estimate:
    """The mean of a value over images; replicates that drew none of the images are left out."""
    sizes = draws.sum(1)
    replicates = (draws @ values)[sizes > 0] / sizes[sizes > 0]
    return Estimate.of(float(values.mean()), replicates, len(values))


def _failed(made: ImageSet) -> Estimate:
    """The share of images that could not be generated; exact, so without an interval."""
    share = 1 - made.count / made.total
    return Estimate(value=share, low=share, high=share, count=made.total)
