"""The promotion gate: whether a candidate may become the champion, with the numbers behind each rule."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from d2f_core.evaluation.bootstrap import percentile_interval
from d2f_core.evaluation.config import FLOW_LOSS, PER_MODEL, GateConfig, GateError, Limit, parse_metric
from d2f_core.evaluation.estimates import Estimate, Metric

Against = Literal["champion", "base"]


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
    """Confidence interval of the paired difference candidate - reference."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The gate's decision."""

    passed: bool
    reason: str
    """The reason in one line."""
    against: Against | None
    rules: tuple[RuleResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_gate(config: GateConfig, measured: set[str], evaluations: tuple[int, ...]) -> None:
    """Refuse rules on metrics that will not be measured, before anything is generated.

    Args:
        measured: names of the metrics.

    Raises:
        GateError: names the rule.
    """
    for rule in config.metrics:
        name, count = parse_metric(rule)
        if name not in measured:
            raise GateError(f"gate: {rule!r} is not measured here. Known: {', '.join(sorted(measured))}.")
        if count and count not in evaluations:
            raise GateError(f"gate: {rule!r}, but images are made at {evaluations} evaluations. Add {count}.")
    if config.without_champion == "limits" and not config.limits:
        raise GateError("gate: without_champion='limits' needs limits, or any first candidate would pass. Add one.")


def judge(config: GateConfig, metrics: Mapping[str, Metric], roles: set[str]) -> Verdict:
    """Apply every rule to the measured values.

    Args:
        metrics: metrics by short name (`frechet`), each with values by role and number of evaluations.
        roles: roles of the measured models, including `candidate`.
    """
    against: Against | None = "champion" if "champion" in roles else None
    if against is None and config.without_champion == "beat_base":
        if "base" not in roles:
            return Verdict(passed=False, reason="there is no champion yet, and no base to beat", against=None)
        against = "base"
    rules = []
    if against is not None:
        better = metrics[parse_metric(config.metric)[0]].higher_is_better
        # Share of the reference by which the candidate may be worse; below 0, it must be better.
        slack = 1 - 1 / config.max_ratio if better else config.max_ratio - 1
        rules.append(_compare(config, config.metric, slack, metrics, against))
        # An unchanged base has no held-out loss, because this project did not train it.
        kept = [name for name in config.must_not_regress if against == "champion" or name != FLOW_LOSS]
        rules += [_compare(config, name, config.tolerance, metrics, against) for name in kept]
    rules += [_limit(limit, metrics) for limit in config.limits]
    broken = [rule.rule for rule in rules if not rule.holds]
    compared = f"the {against}" if against else "absolute limits"
    reason = f"does not hold: {'; '.join(broken)}" if broken else f"all {len(rules)} rules hold against {compared}"
    return Verdict(passed=not broken, reason=reason, against=against, rules=tuple(rules))


def _compare(
    config: GateConfig, name: str, slack: float, metrics: Mapping[str, Metric], against: Against
) -> RuleResult:
    """Whether the candidate is worse than the reference by at most `slack` times the reference's size.

    Compared as a difference, because an unbiased kernel distance can be 0 or negative, where a ratio is meaningless.
    For positive values both are equivalent.
    """
    metric, candidate, reference = _find(name, metrics, against)
    if candidate is None or reference is None:
        return _unmeasured(name, metric, "candidate" if candidate is None else against)
    return compare(
        name, candidate, reference, metric=metric.name, against=against, slack=slack,
        higher_is_better=metric.higher_is_better, confident=config.confident,
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
    strictly: bool = False,
) -> RuleResult:
    """Whether the candidate is worse than the reference by at most `slack` times the reference's size.

    Args:
        name: of the metric in the rule's words; `metric` in full.
        against: what the reference is.
        confident: ask it of the worst end of the paired difference's interval, not of the value.
        strictly: the candidate must be better than the bound; as good does not hold.
    """
    sign = -1 if higher_is_better else 1
    allowed = slack * abs(reference.value)
    low, high = _difference(candidate, reference)
    worst = max(sign * low, sign * high) if confident else sign * (candidate.value - reference.value)
    bound = reference.value + sign * allowed
    words = ("above" if sign < 0 else "below") if strictly else ("at least" if sign < 0 else "at most")
    return RuleResult(
        rule=f"{name} of the candidate is {words} {bound:.4g} "
        f"({against} {reference.value:.4g}{', with confidence' if confident else ''})",
        holds=math.isfinite(worst) and (worst < allowed if strictly else worst <= allowed),
        metric=metric,
        candidate=candidate.value,
        reference=reference.value,
        bound=bound,
        interval=(low, high),
    )


def _difference(candidate: Estimate, reference: Estimate) -> tuple[float, float]:
    """Confidence interval of candidate - reference, from replicates that drew the same prompts."""
    difference = candidate.value - reference.value
    if not len(candidate.replicates) or len(candidate.replicates) != len(reference.replicates):
        return difference, difference
    return percentile_interval(difference, np.asarray(candidate.replicates) - np.asarray(reference.replicates))


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
    metric = metrics[short]
    reference = metric.values.get(against, {}).get(evaluations) if against else None
    return metric, metric.values.get("candidate", {}).get(evaluations), reference
