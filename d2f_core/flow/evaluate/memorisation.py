"""Whether a model repeats its training images: are its images nearer to these than to held-out ones, beyond chance?

Each generated image has one nearest real image among training and held-out ones together. If the model had learned the
distribution and not the images, it would make no difference which of the real images were held out: the share of
generated images that lie nearest to a training image would be as with the labels dealt anew. So the p-value is the
share of deals with at least the measured share (a permutation test).

The question is that of Meehan et al., 2020, arXiv:2004.05675; prompts should be of held-out images, because an image of
a training caption may rightly resemble the training image.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import hypergeom

from d2f_core.evaluation.config import GateConfig
from d2f_core.evaluation.gate import RuleResult

Array = np.ndarray
DEALS = 2_000
CHUNK_ROWS = 256
METRIC = "nearest_training"


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """The result of the test on one set of generated images."""

    share: float
    """Share of generated images that lie nearest to a training image."""
    expected: float
    """Share of training images among the real ones."""
    p_value: float
    """How often chance alone gives at least this share."""
    least_p: float
    """The p-value if every generated image lay nearest to a training image: the smallest that these sets can show."""
    made: int
    training: int
    held_out: int


def nearest_training(made: Array, training: Array, held_out: Array, *, seed: int = 0) -> Memorisation:
    """Test generated images against training and held-out ones.

    Args:
        made, training, held_out: features [images, dimensions] of one network.
        seed: of the deals.
    """
    # Held-out first: of an image that is in both, the held-out one counts as the nearest.
    real = np.concatenate([held_out, training])
    chunks = (made[start : start + CHUNK_ROWS] for start in range(0, len(made), CHUNK_ROWS))
    nearest = np.concatenate([cdist(chunk, real, "sqeuclidean").argmin(1) for chunk in chunks])
    places, weights = np.unique(nearest, return_counts=True)
    hits = int(weights[places >= len(held_out)].sum())
    dealt = _dealt(weights, len(training), len(held_out), seed)
    least = float(hypergeom.pmf(len(places), len(real), len(training), len(places)))
    return Memorisation(
        share=hits / len(made),
        expected=len(training) / len(real),
        p_value=(1 + int((dealt >= hits).sum())) / (1 + len(dealt)),
        least_p=least,
        made=len(made),
        training=len(training),
        held_out=len(held_out),
    )


def _dealt(weights: Array, training: int, held_out: int, seed: int) -> Array:
    """How many generated images lie nearest to a training image in each deal of the labels, int64 [deals].

    Args:
        weights: generated images for which each real image is the nearest, of those real images that are one's.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    labelled = generator.hypergeometric(training, held_out, len(weights), size=DEALS)
    sums = np.empty(DEALS, np.int64)
    for number, count in enumerate(labelled.tolist()):
        sums[number] = generator.permutation(weights)[:count].sum()
    return sums


def memorisation_rule(found: Memorisation | str, config: GateConfig) -> RuleResult:
    """The gate's rule; a text says why there was no test."""
    if not config.memorised:
        found = "memorised is 0"
    elif not isinstance(found, str) and found.least_p >= config.memorised:
        found = _too_few(found, config.memorised)
    if isinstance(found, str):
        return RuleResult(rule=f"memorisation: not applied, {found}", holds=True, metric=METRIC, applied=False)
    return RuleResult(
        rule=f"images of the candidate lie no nearer to training images than chance explains (p {found.p_value:.2g}, "
        f"at least {config.memorised:g}; {100 * found.share:.0f} % are nearest to one of {found.training:,} training "
        f"images, {found.held_out:,} are held out, {100 * found.expected:.0f} % expected)",
        holds=found.p_value >= config.memorised,
        metric=METRIC,
        candidate=found.p_value,
        bound=config.memorised,
    )


def _too_few(found: Memorisation, level: float) -> str:
    """Why these sets cannot show that a model repeats its training images."""
    needed = math.ceil(math.log(level) / math.log(found.expected)) + 1 if 0 < found.expected < 1 else 0
    return (
        f"which {found.made:,} images, {found.held_out:,} held out and {found.training:,} trained on cannot show (p is "
        f"at least {found.least_p:.2g}; it takes about {needed:,} images that resemble different real ones)"
    )
