"""The gate of a registered matcher: it must beat the floors, what else is named, and the champion.

Every rule compares PCK on the same pairs, and asks for it with the confidence of a bootstrap over images: pairs that
share an image are right or wrong together, so that to resample pairs would promise more than they know. A pair counts
as often as its source was drawn, times as often as its target was. Where pairs share no image, intervals are up to
sqrt(3) times as wide as need be.

Source: the pigeonhole bootstrap, Owen, 2007, https://doi.org/10.1214/07-AOAS122.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from d2f_core.correspondence import pck
from d2f_core.correspondence.evaluate.answers import EXACT, FLOOR
from d2f_core.correspondence.evaluate.config import (
    CHAMPION,
    EvaluateMatchesConfig,
    EvaluateMatchesError,
    MatcherChoice,
    MatcherGateConfig,
)
from d2f_core.correspondence.evaluate.measure import Measured
from d2f_core.evaluation.bootstrap import bootstrap_counts
from d2f_core.evaluation.estimates import Estimate
from d2f_core.evaluation.gate import POWER, RuleResult, Verdict, compare, conclude, detectable_difference
from d2f_core.evaluation.pins import Pins, pin_models, registered_name
from d2f_core.evaluation.promotion import Promotion, promote_candidate
from d2f_core.tracking import pin_model

logger = logging.getLogger(__name__)

FLAGS = "gate."
"""Prefix of the gate's flags."""


def pinned(config: EvaluateMatchesConfig) -> tuple[EvaluateMatchesConfig, Pins | None]:
    """The config with versions in place of aliases, and the champion among the matchers, if one of these is judged.

    Raises:
        EvaluateMatchesError: a matcher has the champion's name.
        PinError: the output judged another candidate.
        TrackingError: a version does not exist.
    """
    gate, judged, pins = config.gate, config.judged, None
    matchers = [replace(each, uri=pin_model(each.uri)) if each.uri else each for each in config.compared]
    if judged is not None:
        if CHAMPION in [each.name for each in matchers]:
            raise EvaluateMatchesError(f"a matcher is called {CHAMPION!r}, as the gate calls its own. Rename it.")
        pins = pin_models(
            config.output, candidate=judged.uri, champion=gate.champion, champion_alias=gate.champion_alias, base=""
        )
        if pins.champion not in ("", pins.candidate):
            place = [each.name for each in matchers].index(judged.name)
            matchers.insert(place, MatcherChoice(name=CHAMPION, uri=pins.champion, size=judged.size))
        gate = replace(gate, candidate=judged.name)
    return replace(config, matchers=tuple(matchers), uris=(), gate=gate), pins


def gate(
    config: EvaluateMatchesConfig,
    pins: Pins,
    measured: Mapping[tuple[str, str], Measured],
    images: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """The gate's verdict on the candidate, as JSON values; nothing is promoted yet.

    Args:
        images: keys of each pair's source and target.
    """
    rules = config.gate
    names = [*([CHAMPION] if (CHAMPION, EXACT) in measured else []), *rules.must_beat]
    verdict = judge(
        rules,
        measured[rules.candidate, EXACT],
        {name: measured[name, EXACT] for name in names},
        {name: each for (name, decoding), each in measured.items() if decoding == FLOOR},
        images=images,
        replicates=config.replicates,
        seed=config.seed,
    )
    if pins.champion == pins.candidate:
        verdict = replace(verdict, passed=False, reason="the candidate is the champion already")
    logger.info("gate: %s: %s", "passed" if verdict.passed else "not passed", verdict.reason)
    if verdict.power:
        logger.info("gate: %s", verdict.power)
    return {
        "candidate": pins.candidate,
        "champion": pins.champion,
        "verdict": verdict.to_json(),
        "promotion": None,
        "refused": None,
    }


def promote(config: EvaluateMatchesConfig, pins: Pins, found: dict[str, Any]) -> Promotion | None:
    """Promote a candidate that passed, if it is a registered version, and add to `gate`'s findings what came of it."""
    if not (found["verdict"]["passed"] and config.gate.promote and registered_name(pins.candidate)):
        return None
    promotion = promote_candidate(pins, config.output, alias=config.gate.champion_alias, flags=FLAGS)
    found |= {"promotion": promotion.text, "refused": str(promotion.error) if promotion.error else None}
    return promotion


def judge(
    config: MatcherGateConfig,
    candidate: Measured,
    others: Mapping[str, Measured],
    floors: Mapping[str, Measured],
    *,
    images: Sequence[tuple[str, str]],
    replicates: int,
    seed: int,
) -> Verdict:
    """Apply every rule.

    Args:
        others: the champion, if there is one, and what the candidate must beat, by name.
        floors: by name.
        images: keys of source and target of each pair.
        replicates: resampled sets of images.
    """
    draws = pair_draws(images, replicates, seed)
    mine = estimate(candidate, config, draws)
    rules = [
        _enough(config, len(images)),
        _answered(config, candidate),
        *(_rule(config, mine, estimate(each, config, draws), name) for name, each in {**floors, **others}.items()),
    ]
    return conclude(rules, against="champion" if CHAMPION in others else None, power=_seen(config, rules, images))


def expected_power(config: MatcherGateConfig, images: Sequence[tuple[str, str]]) -> str:
    """What the pairs will see at least, before anything is measured, in one line; empty where no bound is known.

    Args:
        images: as of `judge`.
    """
    if config.average != "image" or not config.confident:
        return ""
    largest = min(1.0, detectable_difference(spread_bound(images), config.confidence))
    return (
        f"{len(images):,} pairs of {_images(images):,} images will see a difference of at most {100 * largest:.0f} "
        f"points of {config.metric} in {100 * POWER:.0f} of 100 evaluations, most often a far smaller one"
    )


def spread_bound(images: Sequence[tuple[str, str]]) -> float:
    """Largest standard deviation that the bootstrap can find in the difference of two means over the pairs.

    A pair's difference lies in [-1, 1], and the covariance of how often two pairs are drawn is 3 for the same two
    images, 1 for pairs that share one, and about 0 for others. Where all images are in equally many of many pairs, this
    is 2 / sqrt(images); matchers that are right and wrong on about the same images differ by far less.
    """
    shared = Counter(name for pair in images for name in pair)
    same = Counter(map(frozenset, images))
    return math.sqrt(sum(count**2 for count in (*shared.values(), *same.values()))) / len(images)


def _images(images: Sequence[tuple[str, str]]) -> int:
    return len({name for pair in images for name in pair})


def _seen(config: MatcherGateConfig, rules: Sequence[RuleResult], images: Sequence[tuple[str, str]]) -> str:
    """What the pairs can see, of the comparison that can see least."""
    sizes = [rule.detectable for rule in rules if rule.detectable]
    if not sizes:
        return ""
    count = _images(images)
    return (
        f"{len(images)} pairs of {count} images see a difference of {100 * max(sizes):.1f} points of {config.metric} "
        f"in {100 * POWER:.0f} of 100 evaluations; half of it takes {4 * count:,} images"
    )


def _enough(config: MatcherGateConfig, pairs: int) -> RuleResult:
    """An interval of a few pairs is too narrow: of equal matchers, more pass than it promises."""
    return RuleResult(
        rule=f"at least {config.least_pairs} pairs are compared ({pairs})", holds=pairs >= config.least_pairs,
        metric=config.metric,
    )  # fmt: skip


def _answered(config: MatcherGateConfig, candidate: Measured) -> RuleResult:
    missing, points = int(candidate.missing.sum()), len(candidate.missing)
    return RuleResult(
        rule=f"no answer of the candidate is missing ({missing} of {points} points)", holds=not missing,
        metric=config.metric, candidate=float(missing), bound=0.0,
    )  # fmt: skip


def _rule(config: MatcherGateConfig, candidate: Estimate, reference: Estimate, name: str) -> RuleResult:
    """All must be beaten; the champion may be missed by the tolerance."""
    return compare(
        f"pck@{config.alpha:g} by {config.average}", candidate, reference, metric=config.metric, against=name,
        slack=config.tolerance if name == CHAMPION else 0.0, higher_is_better=True, confident=config.confident,
        confidence=config.confidence, strictly=True,
    )  # fmt: skip


def pair_draws(images: Sequence[tuple[str, str]], replicates: int, seed: int) -> torch.Tensor:
    """How often each pair counts in each resampled set of images, int64 [sets, pairs]; sets without a pair are left
    out."""
    names = sorted({name for pair in images for name in pair})
    number = {name: place for place, name in enumerate(names)}
    counts = bootstrap_counts(len(names), replicates, seed)
    source, target = (np.array([number[pair[side]] for pair in images]) for side in (0, 1))
    drawn = counts[:, source] * counts[:, target]
    return torch.from_numpy(drawn[drawn.any(axis=1)])


def estimate(measured: Measured, config: MatcherGateConfig, draws: torch.Tensor) -> Estimate:
    """PCK with its replicates; those of two matchers on the same pairs share their draws.

    Args:
        draws: as `pair_draws` makes them.
    """
    scoring = pck.PROTOCOLS["original"].scoring
    once, drawn = (
        pck.pck(measured.matches, scoring, (config.alpha,), draws=each).average(config.average)[:, 0]
        for each in (None, draws)
    )
    value = float(once[0])
    # Too few images to resample: nothing is known of the value's spread, and the rule about pairs refuses.
    replicates = drawn.numpy() if len(drawn) else np.array([value])
    return Estimate.of(value, replicates, measured.matches.size.shape[0])
