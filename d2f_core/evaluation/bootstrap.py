"""Bootstrap confidence intervals: the resampled sets of images, and the interval of a statistic on these sets.

A bootstrap is a matrix of counts [replicates, n] (how often each image was drawn), so that models evaluated on the same
images can share the draws and be compared in pairs.
"""

from collections.abc import Iterator

import numpy as np

Array = np.ndarray


def bootstrap_counts(images: int, replicates: int, seed: int) -> Array:
    """How often each image is drawn, int64 [replicates, images]; depends only on the arguments."""
    if not images:
        return np.zeros((replicates, 0), np.int64)
    generator = np.random.Generator(np.random.Philox(seed))
    return generator.multinomial(images, np.full(images, 1 / images), size=replicates)


def bootstrap_blocks(images: int, replicates: int, seed: int, *, most: int = 2**20) -> Iterator[Array]:
    """The rows of `bootstrap_counts` in blocks of at most `most` numbers (but at least one row), for sets of millions
    of images, whose counts together would not fit into memory."""
    generator = np.random.Generator(np.random.Philox(seed))
    shares, step = np.full(images, 1 / images), max(1, most // images)
    for start in range(0, replicates, step):
        yield generator.multinomial(images, shares, size=min(step, replicates - start))


def percentile_interval(value: float, replicates: Array, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a statistic, corrected for the bootstrap's bias.

    A resampled set has fewer distinct images, which raises distances; uncorrected, the interval of a small distance
    would lie above the distance itself. Without a replicate the interval is the value alone.
    """
    if not len(replicates):
        return value, value
    edge = (1 - level) / 2
    low, high = np.quantile(replicates, [edge, 1 - edge]) - (replicates.mean() - value)
    return float(low), float(high)
