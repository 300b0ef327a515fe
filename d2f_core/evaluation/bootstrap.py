"""Intervals by resampling: which images a resampled set holds, and the interval of what was computed on such sets.

A bootstrap is a matrix of counts [replicates, n] (how often each image was drawn), so that sets that share their images
can share their draws and be compared in pairs.
"""

import numpy as np

Array = np.ndarray


def bootstrap_counts(images: int, replicates: int, seed: int) -> Array:
    """How often each image is drawn, int64 [replicates, images]; a function of the arguments alone."""
    generator = np.random.Generator(np.random.Philox(seed))
    return generator.multinomial(images, np.full(images, 1 / images), size=replicates)


def percentile_interval(value: float, replicates: Array, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a statistic, moved by the bootstrap's own bias.

    A resampled set has fewer different images, which carries distances upward; without the move the interval of a small
    distance would lie above the distance itself.
    """
    edge = (1 - level) / 2
    low, high = np.quantile(replicates, [edge, 1 - edge]) - (replicates.mean() - value)
    return float(low), float(high)
