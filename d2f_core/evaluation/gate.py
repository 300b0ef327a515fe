"""The promotion gate: whether a candidate may become the champion, with the numbers behind each rule."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from d2f_core.evaluation.bootstrap import percentile_interval
from d2f_core.evaluation.estimates import Estimate, Metric

Against = Literal["champion", "base"]
NAMED = re.compile(r"(?P<metric>[A-Za-z][\w.@-]*)@(?P<evaluations>[1-9][0-9]*)")
"""The last @ parts them: a metric's own name may hold one, as pck@0.1 does."""
FLOW_LOSS = "flow_loss"
PER_MODEL = (FLOW_LOSS, "straightness")
"""Metrics with one value per model, whatever the number of evaluations: named without one, and kept under 0."""


class GateError(ValueError):
    """A gate whose rules cannot be applied, with the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """An absolute bound, whatever the champion does."""

    metric: str
    """NAME@EVALUATIONS, e.g. frechet@4."""
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        parse_metric(self.metric)
        if self.at_most is None and self.at_least is None:
            raise GateError(f"the limit on {self.metric} has neither at_most nor at_least. Give one of them.")


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """When a candidate passes: it is better where it must be, and nowhere worse than tolerated."""

    metric: str = "frechet@4"
    """NAME@EVALUATIONS that decides; names: frechet, kernel, precision, recall, clip_score, failed; and by itself
    straightness, or flow_loss, the held-out loss that each model's training measured."""
    max_ratio: float = 1.0
    """Candidate over champion at most; where more is better, champion over candidate. 0.95 asks for 5 % better."""
    must_not_regress: tuple[str, ...] = ()
    """Further ones that may not get worse by more than `tolerance`. flow_loss here refuses a model that only knows its
    training images better; compare trainings that held out the same rows."""
    tolerance: float = 0.05
    """Share of the champion's value by which those may be worse."""
    confident: bool = False
    """The upper end of the paired difference's interval must keep the bound, not the measured value alone."""
    limits: tuple[Limit, ...] = ()
    """Absolute bounds."""
    without_champion: Literal["beat_base", "limits"] = "beat_base"
    """The first candidate: compared to the base model, or by `limits` alone."""

    def __post_init__(self) -> None:
        for name in (self.metric, *self.must_not_regress):
            parse_metric(name)
        if self.max_ratio <= 0:
            raise GateError(f"max_ratio={self.max_ratio} must be above 0. 1 asks for no worse.")
        if self.tolerance < 0:
            raise GateError(f"tolerance={self.tolerance} must be at least 0.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that a rule reads."""
        return (self.metric, *self.must_not_regress, *(limit.metric for limit in self.limits))


@dataclass(frozen=True, kw_only=True)
class RuleResult:
    """One rule, and what it found."""

    rule: str
    """In words."""
    holds: bool
    metric: str
    candidate: float | None = None
    bound: float | None = None
    reference: float | None = None
    """The champion's or base's value."""
    interval: tuple[float, float] | None = None
    """Of the paired difference candidate - reference."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate says."""

    passed: bool
    reason: str
    """One line."""
    against: Against | None
    rules: tuple[RuleResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_metric(name: str) -> tuple[str, int]:
    """`frechet@4` as its two parts, `flow_loss` with 0. Raises GateError for any other form."""
    if name in PER_MODEL:
        return name, 0
    found = NAMED.fullmatch(name)
    if found is None or found["metric"] in PER_MODEL:
        raise GateError(
            f"{name!r} is not NAME@EVALUATIONS, such as frechet@4, nor one of {', '.join(PER_MODEL)}. Correct it."
        )
    return found["metric"], int(found["evaluations"])


def check_gate(config: GateConfig, measured: set[str], evaluations: tuple[int, ...]) -> None:
    """Refuse rules about what will not be measured, before anything is generated.

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
        metrics: by short name (`frechet`), each with values by role and number of evaluations.
        roles: which models were measured; `candidate` is one of them.
    """
    against: Against | None = "champion" if "champion" in roles else None
    if against is None and config.without_champion == "beat_base":
        if "base" not in roles:
            return Verdict(passed=False, reason="there is no champion yet, and no base to beat", against=None)
        against = "base"
    rules = []
    if against is not None:
        better = metrics[parse_metric(config.metric)[0]].higher_is_better
        # As a share of the reference by which the candidate may be worse: below 0, it must be better.
        slack = 1 - 1 / config.max_ratio if better else config.max_ratio - 1
        rules.append(_compare(config, config.metric, slack, metrics, against))
        # A base as it is was trained by others: there is no held-out loss of it.
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

    As a difference, because an unbiased kernel distance can be 0 or below, where a ratio says nothing. Above 0 the two
    are the same.
    """
    metric, candidate, reference = _find(name, metrics, against)
    if candidate is None or reference is None:
        return _unmeasured(name, metric, "candidate" if candidate is None else against)
    sign = -1 if metric.higher_is_better else 1
    allowed = slack * abs(reference.value)
    low, high = _difference(candidate, reference)
    worst = max(sign * low, sign * high) if config.confident else sign * (candidate.value - reference.value)
    bound = reference.value + sign * allowed
    return RuleResult(
        rule=f"{name} of the candidate is {'at least' if sign < 0 else 'at most'} {bound:.4g} "
        f"({against} {reference.value:.4g}{', with confidence' if config.confident else ''})",
        holds=math.isfinite(worst) and worst <= allowed,
        metric=metric.name,
        candidate=candidate.value,
        reference=reference.value,
        bound=bound,
        interval=(low, high),
    )


def _difference(candidate: Estimate, reference: Estimate) -> tuple[float, float]:
    """Interval of candidate - reference, from replicates that drew the same prompts."""
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
