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
FLOOR_SPLITS, FEWEST_FOR_FLOOR = 40, 8
"""Random halves of the real images that the floor is a mean of, and the fewest images that are halved."""


class FeaturePart(NamedTuple):
    """Features of some of a set's images."""

    rows: np.ndarray
    """int64 [n]: positions of the images in the whole set, by which images of one prompt file are paired across
    models."""
    features: np.ndarray
    """float64 [n, d]."""
    caption_scores: np.ndarray | None
    """float64 [n]."""
    sample_ids: np.ndarray | None = None
    """Strings [n]; not kept by what is gathered."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """The statistics of a set of images that metrics need."""

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
        only: bool [total]: rows to use; None: all. Sets with the same rows share their draws.
    """
    chosen = np.ones(total, bool) if only is None else only
    rows = np.flatnonzero(chosen)
    place = np.cumsum(chosen) - 1
    keep = at_random(np.ones(len(rows), bool), config.pairwise_rows, draws)
    counts = bootstrap_counts(len(rows), config.replicates, draws)
    moments = FeatureMoments.none(dimensions)
    resampled = [moments] * config.replicates
    kept: list[FeaturePart] = []
    scores: list[tuple[np.ndarray, np.ndarray]] = []
    for part in parts:
        part = subset(part, chosen[part.rows])
        if not len(part.rows):
            continue
        places = place[part.rows]
        moments = moments.merge(FeatureMoments.of(part.features))
        for number, drawn in enumerate(counts[:, places]):
            if drawn.any():
                resampled[number] = resampled[number].merge(FeatureMoments.of(part.features, drawn))
        kept.append(subset(part, keep[places]))
        if part.caption_scores is not None:
            scores.append((places, part.caption_scores))
    pairwise = _sorted(kept, dimensions)
    return ImageSet(
        moments=moments,
        resampled=tuple(resampled),
        kept=pairwise,
        kept_draws=counts[:, place[pairwise.rows]],
        caption_scores=np.concatenate([each for _, each in scores]) if scores else np.empty(0),
        caption_draws=counts[:, np.concatenate([rows for rows, _ in scores])] if scores else np.empty((0, 0), np.int64),
    )


def at_random(mask: np.ndarray, most: int, seed: int) -> np.ndarray:
    """`mask` with at most `most` of its true places, chosen at random."""
    places = np.flatnonzero(mask)
    if len(places) <= most:
        return mask
    kept = np.zeros_like(mask)
    kept[np.random.Generator(np.random.Philox(seed)).permutation(places)[:most]] = True
    return kept


def subset(part: FeaturePart, mask: np.ndarray) -> FeaturePart:
    """The rows of a part where `mask` is true."""
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
    """Every metric of a generated set against the real one, by short name; none if too few images are usable."""
    found: dict[str, Estimate] = {}
    if not all(enough(images, config) for images in (made, real)):
        return found
    found["frechet"] = frechet_estimate(real, made)
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


def frechet_estimate(real: ImageSet, made: ImageSet) -> Estimate:
    """The Frechet distance of a generated set from the real one, with its replicates."""
    pairs = zip(made.resampled, real.resampled, strict=True)
    replicates = np.array([frechet_distance(*pair) for pair in pairs])
    return Estimate.of(frechet_distance(made.moments, real.moments), replicates, made.count)


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


def failed_share(usable: np.ndarray) -> Estimate:
    """The share of prompts without an image; exact, so without an interval.

    Args:
        usable: bool [prompts].
    """
    share = 1 - float(usable.mean())
    return Estimate(value=share, low=share, high=share, count=len(usable), exact=True)


def noise_floor(real: Iterable[FeaturePart], *, total: int, made: int, config: MeasureConfig) -> dict[str, Estimate]:
    """What `made` images from the reference's own distribution would measure against it, by short name: Frechet and
    kernel distance; none if there are too few images.

    A Frechet distance of equal distributions is due to sampling alone, and grows with the sum of the inverse numbers of
    images. So the distance between two halves of the real images, times (1 / made + 1 / total) / (4 / total), is what a
    fresh set would have. The kernel distance has no such bias. Both are means over random halves; the intervals hold 95
    of 100 splits.
    """
    rows = np.zeros(total, bool)
    generator = np.random.Generator(np.random.Philox(REAL_DRAWS))
    rows[generator.permutation(total)[: config.pairwise_rows]] = True
    parts = [subset(part, rows[part.rows]).features for part in real]
    features = np.concatenate([part for part in parts if len(part)] or [np.empty((0, 1))])
    if len(features) < FEWEST_FOR_FLOOR or not made:
        return {}
    scale = (1 / made + 1 / total) / (4 / len(features))
    kernel = KernelDistance(features, features)
    distances, kernels = [], []
    for _ in range(FLOOR_SPLITS):
        left = generator.permutation(len(features)) < len(features) // 2
        halves = FeatureMoments.of(features[left]), FeatureMoments.of(features[~left])
        distances.append(scale * frechet_distance(*halves))
        kernels.append(kernel((left.astype(int), (~left).astype(int))))
    return {
        name: Estimate(
            value=float(np.mean(found)), low=float(np.quantile(found, 0.025)), high=float(np.quantile(found, 0.975)),
            count=made,
        )
        for name, found in (("frechet", distances), ("kernel", kernels))
    }  # fmt: skip
