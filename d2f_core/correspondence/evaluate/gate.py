"""The gate of a registered matcher: it must beat the floors and what else is named, and not be worse than the champion.

Every rule compares PCK on the same pairs, and asks for it with the confidence of a bootstrap over the pairs that both
share: which pairs happened to be asked cannot decide.
"""

from collections.abc import Mapping
from dataclasses import replace

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
from d2f_core.evaluation.gate import RuleResult, Verdict, compare
from d2f_core.evaluation.pins import Pins, pin_models


def pinned(config: EvaluateMatchesConfig) -> tuple[EvaluateMatchesConfig, Pins | None]:
    """The config with the candidate's version in place of its alias, and the champion among the matchers.

    Nothing is pinned without a candidate.

    Raises:
        EvaluateMatchesError: a matcher has the champion's name.
        PinError: the output judged another candidate.
        TrackingError: a version does not exist.
    """
    gate, compared, judged = config.gate, config.compared, config.judged
    if judged is None:
        return config, None
    if CHAMPION in [each.name for each in compared]:
        raise EvaluateMatchesError(f"a matcher is called {CHAMPION!r}, as the gate calls its own. Rename it.")
    pins = pin_models(
        config.output, candidate=judged.uri, champion=gate.champion, champion_alias=gate.champion_alias, base=""
    )
    matchers = []
    for each in compared:
        if each.name != judged.name:
            matchers.append(each)
            continue
        if pins.champion not in ("", pins.candidate):
            matchers.append(MatcherChoice(name=CHAMPION, uri=pins.champion, size=judged.size))
        matchers.append(replace(judged, uri=pins.candidate))
    named = replace(gate, candidate=judged.name)
    return replace(config, matchers=tuple(matchers), uris=(), gate=named), pins


def judge(
    config: MatcherGateConfig,
    candidate: Measured,
    others: Mapping[str, Measured],
    floors: Mapping[str, Measured],
    *,
    replicates: int,
    seed: int,
) -> Verdict:
    """Apply every rule.

    Args:
        others: the champion, if there is one, and what the candidate must beat, by name.
        floors: by name.
        replicates: resampled sets of pairs.
    """
    mine = estimate(candidate, config, replicates, seed)
    rules = [
        _rule(config, mine, estimate(each, config, replicates, seed), name)
        for name, each in {**floors, **others}.items()
    ]
    broken = [rule.rule for rule in rules if not rule.holds]
    reason = f"does not hold: {'; '.join(broken)}" if broken else f"all {len(rules)} rules hold"
    against = "champion" if CHAMPION in others else None
    return Verdict(passed=not broken, reason=reason, against=against, rules=tuple(rules))


def _rule(config: MatcherGateConfig, candidate: Estimate, reference: Estimate, name: str) -> RuleResult:
    """The champion may be equalled within the tolerance; all else must be beaten."""
    champion = name == CHAMPION
    return compare(
        f"pck@{config.alpha:g} by {config.average}", candidate, reference, metric=config.metric, against=name,
        slack=config.tolerance if champion else 0.0, higher_is_better=True, confident=config.confident,
        strictly=not champion,
    )  # fmt: skip


def estimate(measured: Measured, config: MatcherGateConfig, replicates: int, seed: int) -> Estimate:
    """PCK with its replicates; those of two matchers on the same pairs share their draws."""
    pairs, scoring = len(measured.pair_ids), pck.PROTOCOLS["original"].scoring
    draws = torch.from_numpy(bootstrap_counts(pairs, replicates, seed))
    once, drawn = (
        pck.pck(measured.matches, scoring, (config.alpha,), draws=each).average(config.average)[:, 0]
        for each in (None, draws)
    )
    return Estimate.of(float(once[0]), drawn.numpy(), pairs)
