"""The gate of a registered matcher: it must beat the floors, what else is named, and the champion.

Every rule compares PCK on the same pairs, and asks for it with the confidence of a bootstrap over images: pairs that
share an image are right or wrong together, so that to resample pairs would promise more than they know. A pair counts
as often as its source was drawn, times as often as its target was. Where pairs share no image, intervals are up to
sqrt(3) times as wide as need be.

Source: the pigeonhole bootstrap, Owen, 2007, https://doi.org/10.1214/07-AOAS122.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from d2f_core.correspondence import pck
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
from d2f_core.evaluation.gate import POWER, RuleResult, Verdict, compare
from d2f_core.evaluation.pins import Pins, pin_models
from d2f_core.tracking import pin_model


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
        *(_rule(config, mine, estimate(each, config, draws), name) for name, each in {**floors, **others}.items()),
    ]
    broken = [rule.rule for rule in rules if not rule.holds]
    reason = f"does not hold: {'; '.join(broken)}" if broken else f"all {len(rules)} rules hold"
    against = "champion" if CHAMPION in others else None
    return Verdict(
        passed=not broken, reason=reason, against=against, rules=tuple(rules), power=_seen(config, rules, images)
    )


def _seen(config: MatcherGateConfig, rules: Sequence[RuleResult], images: Sequence[tuple[str, str]]) -> str:
    """What the pairs can see, of the comparison that can see least."""
    sizes = [rule.detectable for rule in rules if rule.detectable]
    if not sizes:
        return ""
    count = len({name for pair in images for name in pair})
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
