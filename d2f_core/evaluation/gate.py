"""The promotion gate: whether a candidate may become the champion, with the numbers behind each rule.

A comparison is a one-sided test at the config's confidence: the paired difference, plus so many standard deviations of
its bootstrap replicates, must keep the bound. So of equal models the share 1 - confidence passes. The smallest
difference that such a test sees in nine of ten evaluations stands beside it.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import norm

from d2f_core.evaluation.config import PER_MODEL, GateConfig, GateError, Limit, parse_metric
from d2f_core.evaluation.estimates import Estimate, Metric

Against = Literal["champion", "base"]
FAILED = "failed"
POWER = 0.9
"""Share of evaluations in which a difference of the detectable size is seen."""
ENOUGH_PROMPTS = 1000
"""Below this, only large differences are seen."""
TYPICAL_DETECTABLE = 2.2
"""Detectable difference of a Frechet distance, as a share of it, times the root of the number of prompts: as measured
where the confidence is 99 % (docs/evaluation.md), and what to expect before anything is."""


@dataclass(frozen=True, kw_only=True)
class RuleResult:
    """One rule and its result."""

    rule: str
    """The rule in words."""
    holds: bool
    metric: str
    candidate: float | None = None
    bound: float | None = None
    reference: float | None = None
    """The value of the champion or base."""
    interval: tuple[float, float] | None = None
    """Interval of the paired difference candidate - reference, each end at the gate's one-sided confidence."""
    detectable: float | None = None
    """Smallest difference that this comparison sees in nine of ten evaluations; None if its spread is unknown."""
    applied: bool = True
    """False: the rule was not applied, for the reason in its words; it then holds."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The gate's decision."""

    passed: bool
    reason: str
    """The reason in one line."""
    against: Against | None
    rules: tuple[RuleResult, ...] = ()
    power: str = ""
    """What the evaluation can see, and how many prompts a smaller difference takes, in one line."""
    notes: tuple[str, ...] = ()
    """What else a reader has to know to trust the comparison."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_gate(
    config: GateConfig, measured: set[str], evaluations: tuple[int, ...], *, plain: Set[str] = frozenset()
) -> None:
    """Refuse rules on metrics that will not be measured, before anything is generated.

    Args:
        measured: names of the metrics.
        plain: names of those without an interval, which can have limits but cannot be compared.

    Raises:
        GateError: names the rule.
    """
    compared = (config.metric, *config.must_not_regress)
    for rule in config.metrics:
        name, count = parse_metric(rule)
        if name in plain and rule in compared:
            raise GateError(
                f"gate: {rule!r} is a plain figure without an interval, so that equal models cannot be told from "
                "better ones. Compare by frechet or kernel, and give it a limit if need be."
            )
        if name not in measured | plain:
            raise GateError(f"gate: {rule!r} is not measured here. Known: {', '.join(sorted(measured))}.")
        if count and count not in evaluations:
            raise GateError(f"gate: {rule!r}, but images are made at {evaluations} evaluations. Add {count}.")
    if config.without_champion == "limits" and not config.limits:
        raise GateError("gate: without_champion='limits' needs limits, or any first candidate would pass. Add one.")


def judge(
    config: GateConfig,
    metrics: Mapping[str, Metric],
    roles: set[str],
    *,
    also: Sequence[RuleResult] = (),
    notes: Sequence[str] = (),
) -> Verdict:
    """Apply every rule to the measured values.

    Args:
        metrics: metrics by short name (`frechet`), each with values by role and number of evaluations.
        roles: roles of the measured models, including `candidate`.
        also: results of rules that are not comparisons of metrics.
        notes: kept in the verdict.
    """
    against: Against | None = "champion" if "champion" in roles else None
    if against is None and config.without_champion == "beat_base":
        if "base" not in roles:
            return Verdict(passed=False, reason="there is no champion yet, and no base to beat", against=None)
        against = "base"
    rules, power = _failures(config, metrics), ""
    if against is not None:
        better = _find(config.metric, metrics, against)[0].higher_is_better
        # Share of the reference by which the candidate may be worse; below 0, it must be better.
        slack = 1 - 1 / config.max_ratio if better else config.max_ratio - 1
        decisive = _compare(config, config.metric, slack, metrics, against, decides=True)
        power = _seen(config, decisive, _find(config.metric, metrics, against)[1])
        rules.append(decisive)
        rules += [_compare(config, name, config.tolerance, metrics, against) for name in config.must_not_regress]
    rules += [*(_limit(limit, metrics) for limit in config.limits), *also]
    compared = f"against the {against}" if against else "against absolute limits"
    return conclude(rules, against=against, compared=compared, power=power, notes=notes)


def conclude(
    rules: Sequence[RuleResult],
    *,
    against: Against | None,
    compared: str = "",
    power: str = "",
    notes: Sequence[str] = (),
) -> Verdict:
    """The decision that follows from the results of all rules.

    Args:
        compared: what is said after "all rules hold".
    """
    broken = [rule.rule for rule in rules if not rule.holds]
    held = f"all {sum(rule.applied for rule in rules)} rules hold {compared}".rstrip()
    return Verdict(
        passed=not broken,
        reason=f"does not hold: {'; '.join(broken)}" if broken else held,
        against=against,
        rules=tuple(rules),
        power=power,
        notes=tuple(notes),
    )


def _failures(config: GateConfig, metrics: Mapping[str, Metric]) -> list[RuleResult]:
    """The candidate makes an image of every prompt, at each number of evaluations."""
    if FAILED not in metrics:
        return []
    metric = metrics[FAILED]
    return [
        RuleResult(
            rule=f"at {count} evaluations the candidate fails on at most {config.most_failed:.4g} of the prompts "
            f"({share.value:.4g})",
            holds=share.value <= config.most_failed,
            metric=metric.name,
            candidate=share.value,
            bound=config.most_failed,
        )
        for count, share in sorted(metric.values.get("candidate", {}).items())
    ]


def _compare(
    config: GateConfig,
    name: str,
    slack: float,
    metrics: Mapping[str, Metric],
    against: Against,
    *,
    decides: bool = False,
) -> RuleResult:
    """Whether the candidate is worse than the reference by at most `slack` times the reference's size.

    Compared as a difference, because an unbiased kernel distance can be 0 or negative, where a ratio is meaningless.
    For positive values both are equivalent.
    """
    metric, candidate, reference = _find(name, metrics, against)
    if metric.missing and not decides:
        return RuleResult(rule=f"{name}: not applied, {metric.missing}", holds=True, metric=metric.name, applied=False)
    if candidate is None or reference is None:
        return _unmeasured(name, metric, "candidate" if candidate is None else against)
    return compare(
        name, candidate, reference, metric=metric.name, against=against, slack=slack,
        higher_is_better=metric.higher_is_better, confident=config.confident, confidence=config.confidence,
        strictly=decides,
    )  # fmt: skip


def compare(
    name: str,
    candidate: Estimate,
    reference: Estimate,
    *,
    metric: str,
    against: str,
    slack: float,
    higher_is_better: bool,
    confident: bool,
    confidence: float = 0.99,
    strictly: bool = False,
) -> RuleResult:
    """Whether the candidate is worse than the reference by at most `slack` times the reference's size.

    Args:
        name: of the metric in the rule's words; `metric` in full.
        against: what the reference is.
        confident: ask it of the worse end of the paired difference's interval, not of the value.
        confidence: one-sided, of that interval.
        strictly: the candidate must be better than the bound; as good does not hold.
    """
    sign = -1 if higher_is_better else 1
    allowed = slack * abs(reference.value)
    difference, spread = candidate.value - reference.value, paired_spread(candidate, reference)
    reach = float(norm.ppf(confidence)) * (spread or 0.0)
    unknown = confident and spread is None
    worst = math.inf if unknown else sign * difference + (reach if confident else 0.0)
    bound = reference.value + sign * allowed
    words = ("above" if sign < 0 else "below") if strictly else ("at least" if sign < 0 else "at most")
    return RuleResult(
        rule=f"{name} of the candidate is {words} {bound:.4g} "
        f"({against} {reference.value:.4g}{_confidence(confidence, unknown) if confident else ''})",
        holds=math.isfinite(worst) and (worst < allowed if strictly else worst <= allowed),
        metric=metric,
        candidate=candidate.value,
        reference=reference.value,
        bound=bound,
        interval=None if unknown else (difference - reach, difference + reach),
        detectable=None if not spread else detectable_difference(spread, confidence if confident else 0.5),
    )


def _confidence(confidence: float, unknown: bool) -> str:
    return ", but from so few images nothing is certain" if unknown else f", with {100 * confidence:g} % confidence"


def paired_spread(candidate: Estimate, reference: Estimate) -> float | None:
    """Standard deviation of candidate - reference, from replicates that drew the same prompts; 0 between exact values,
    None where it cannot be known: without replicates, or from a single image.
    """
    if candidate.exact and reference.exact:
        return 0.0
    if min(candidate.count, reference.count) < 2:
        return None
    if len(candidate.replicates) < 2 or len(candidate.replicates) != len(reference.replicates):
        return None
    return float(np.std(np.asarray(candidate.replicates) - np.asarray(reference.replicates), ddof=1))


def detectable_difference(spread: float, confidence: float) -> float:
    """Smallest difference, by which a model is better, that is seen in nine of ten evaluations.

    Args:
        spread: standard deviation of the measured difference.
    """
    return float(norm.ppf(confidence) + norm.ppf(POWER)) * spread


def prompts_needed(prompts: int, detectable: float, wanted: float) -> int:
    """Prompts for which the difference `wanted` is detectable where `detectable` is with `prompts` of them: the spread
    falls with their root.
    """
    return math.ceil(prompts * (detectable / wanted) ** 2)


def expected_power(config: GateConfig, prompts: int, most: int) -> str:
    """What so many prompts will about see, and how many the wanted difference takes, in one line; empty where the
    deciding metric is no Frechet distance, of which alone this is known before it is measured.

    Args:
        most: prompts that are compared at most.
    """
    if parse_metric(config.metric)[0] != "frechet" or not config.confident:
        return ""
    factor = detectable_difference(1.0, config.confidence) / detectable_difference(1.0, GateConfig.confidence)
    prompts = min(prompts, most)
    share = factor * TYPICAL_DETECTABLE / math.sqrt(prompts)
    return (
        f"{prompts:,} prompts will see a difference of about {100 * share:.2g} % of {config.metric} in "
        f"{100 * POWER:.0f} of 100 evaluations; one of {100 * config.detect:g} % takes about "
        f"{prompts_needed(prompts, share, config.detect):,} prompts"
    )


def _seen(config: GateConfig, rule: RuleResult, candidate: Estimate | None) -> str:
    if candidate is None or not rule.detectable or not math.isfinite(rule.detectable) or not rule.reference:
        return ""
    share, wanted = rule.detectable / abs(rule.reference), config.detect * abs(rule.reference)
    needed = prompts_needed(candidate.count, rule.detectable, wanted)
    return (
        f"{candidate.count} prompts see a difference of {rule.detectable:.3g} in {config.metric} ({100 * share:.2g} % "
        f"of the {rule.reference:.4g} compared with) in {100 * POWER:.0f} of 100 evaluations; one of "
        f"{100 * config.detect:g} % takes {needed:,} prompts"
    )


def _limit(limit: Limit, metrics: Mapping[str, Metric]) -> RuleResult:
    metric, candidate, _ = _find(limit.metric, metrics, None)
    if candidate is None:
        return _unmeasured(limit.metric, metric, "candidate")
    low = -math.inf if limit.at_least is None else limit.at_least
    high = math.inf if limit.at_most is None else limit.at_most
    words = [f"at least {low:g}"] if limit.at_least is not None else []
    words += [f"at most {high:g}"] if limit.at_most is not None else []
    return RuleResult(
        rule=f"{limit.metric} of the candidate is {' and '.join(words)}",
        holds=low <= candidate.value <= high,
        metric=metric.name,
        candidate=candidate.value,
        bound=high if limit.at_most is not None else low,
    )


def _unmeasured(name: str, metric: Metric, role: str) -> RuleResult:
    return RuleResult(
        rule=f"{name} of the {role} is known ({'not measured' if name in PER_MODEL else 'too few usable images'})",
        holds=False,
        metric=metric.name,
    )


def _find(
    name: str, metrics: Mapping[str, Metric], against: Against | None
) -> tuple[Metric, Estimate | None, Estimate | None]:
    short, evaluations = parse_metric(name)
    metric = metrics.get(short) or Metric(name=short, title=short, higher_is_better=False, values={})
    reference = metric.values.get(against, {}).get(evaluations) if against else None
    return metric, metric.values.get("candidate", {}).get(evaluations), reference
