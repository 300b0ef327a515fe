"""The gate of a registered depth model: it must beat the floors, what else is named, and the champion.

Every rule compares one metric on the images that both have a map of, and asks for it with the confidence of a bootstrap
whose draws of images both share. Images without a map are a rule of their own, and so are settings that differ.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from d2f_core.evaluation.config import parse_metric
from d2f_core.evaluation.gate import POWER, RuleResult, Verdict, compare, conclude, prompts_needed
from d2f_core.evaluation.pins import AUTO, Pins, pin_models, registered_name
from d2f_core.evaluation.promotion import Promotion, check_may_promote, promote_candidate
from d2f_core.flow.depth.config import FLOORS, DepthEvaluationError, DepthGateConfig, EvaluateDepthConfig
from d2f_core.flow.depth.errors import higher_is_better, mean_estimates
from d2f_core.flow.depth.map_index import MapIndex
from d2f_core.flow.depth.metrics import METRICS

logger = logging.getLogger(__name__)

Array = np.ndarray
SETTINGS = ("solver", "shift", "time_grid", "ensemble", "seed", "resolution", "crop")
"""What two models may have been asked for differently, beside their steps: by its name in an output's fingerprint."""
FLAGS = "gate."
"""What stands before the names of the gate's flags."""
CHAMPION: Literal["champion"] = "champion"
"""What the champion's predictions are called in rules, whatever their title."""


@dataclass(frozen=True, kw_only=True)
class GatePlan:
    """What is judged by what; checked before anything is measured."""

    candidate: str
    """Title, as the others."""
    champion: str
    """Empty: there is none."""
    must_beat: tuple[str, ...]
    metric: str
    evaluations: int
    pins: Pins
    different: tuple[str, ...]
    """Settings in which the candidate's predictions differ from the champion's and from those of `must_beat`, in
    words."""


def plan_gate(
    config: EvaluateDepthConfig, place: str, models: Mapping[str, Mapping[str, Any]], maps: Sequence[MapIndex]
) -> GatePlan | None:
    """The gate's plan; None if nothing is judged.

    Args:
        place: of the comparison's errors, where its models are pinned.

    Raises:
        DepthEvaluationError: a title, a metric or a number of evaluations is not there, or the champion's predictions.
        TrackingError: a version does not exist.
    """
    rules = config.gate
    if not rules.candidate:
        return None
    metric, evaluations = parse_metric(rules.metric)
    if metric not in METRICS:
        raise DepthEvaluationError(f"gate.metric={rules.metric!r} is not measured here. Known: {', '.join(METRICS)}.")
    candidate = _titled("candidate", rules.candidate, models)
    named = "" if rules.champion in ("", AUTO) else _titled("champion", rules.champion, models)
    must_beat = tuple(_titled("must_beat", title, models) for title in rules.must_beat)
    if candidate in (named, *must_beat):
        raise DepthEvaluationError(f"gate: the candidate {candidate!r} is to beat itself. Leave it out.")
    if CHAMPION in must_beat:
        raise DepthEvaluationError(f"gate.must_beat names {CHAMPION!r}, as the gate calls its own. Retitle them.")
    pins = _pinned(rules, place, models[candidate]["uri"], models[named]["uri"] if named else "")
    champion = named or _champion(pins, candidate, models, rules)
    others = [*([champion] if champion else []), *(title for title in must_beat if title != champion)]
    by_place = {(one.role, one.evaluations): one for one in maps}
    for title in (candidate, *others):
        if (title, evaluations) not in by_place:
            counts = [count for role, count in by_place if role == title]
            raise DepthEvaluationError(
                f"gate.metric={rules.metric!r}, but {title!r} was predicted at {counts} evaluations. Give one of them: "
                f"--gate.metric {metric}@{counts[-1]}."
            )
    # The fingerprint has all numbers of steps, of which one is judged.
    asked = {
        title: {"crop": "square", **models[title], "steps": by_place[title, evaluations].steps}
        for title in (candidate, *others)
    }
    return GatePlan(
        candidate=candidate, champion=champion, must_beat=must_beat, metric=metric, evaluations=evaluations, pins=pins,
        different=tuple(
            words for title in others
            for words in _different(asked[candidate], asked[title], CHAMPION if title == champion else title)
        ),
    )  # fmt: skip


def _pinned(rules: DepthGateConfig, place: str, candidate: str, named: str) -> Pins:
    """The versions to compare.

    Args:
        named: URI of the model whose predictions are named as the champion's, if any are.
    """
    pins = pin_models(
        place, candidate=candidate, champion=named or rules.champion, champion_alias=rules.champion_alias, base=""
    )  # fmt: skip
    if named and named != pins.champion:
        raise DepthEvaluationError(
            f"gate.champion={rules.champion!r} is predicted by {named!r}, and the champion is {pins.champion!r}. "
            "Predict the same images with that version, or give another output."
        )
    if rules.promote:
        check_may_promote(pins, place, alias=rules.champion_alias, flags=FLAGS)
    return pins


def expected_power(config: DepthGateConfig, images: int) -> str:
    """What is known, before the errors are, of the differences that will be seen; in one line."""
    return (
        f"{images:,} images; how small a difference in {config.metric} they see is known when they are measured, and "
        "falls with the root of their number"
    )


def _titled(what: str, title: str, models: Mapping[str, Mapping[str, Any]]) -> str:
    """The title of predictions that are given by title or model URI."""
    for each, about in models.items():
        if title in (each, about["uri"]):
            return each
    raise DepthEvaluationError(f"gate.{what} names {title!r}, which is none of the predictions {list(models)}.")


def _champion(pins: Pins, candidate: str, models: Mapping[str, Mapping[str, Any]], rules: DepthGateConfig) -> str:
    """Title of the predictions by the pinned champion; empty if there is none, or if it is the candidate."""
    if pins.champion in ("", pins.candidate):
        return ""
    for title, about in models.items():
        if about["uri"] == pins.champion and title != candidate:
            return title
    raise DepthEvaluationError(
        f"{pins.champion} is @{rules.champion_alias}, and none of the predictions is by it. Predict the same images "
        f"with it (python -m pipelines.predict_depth ... --model {pins.champion}) and give both outputs."
    )


def _different(mine: Mapping[str, Any], theirs: Mapping[str, Any], title: str) -> list[str]:
    whose = "the champion's" if title == CHAMPION else f"that of {title!r}"
    return [
        f"{name} {mine.get(name)}, {whose} {theirs.get(name)}"
        for name in ("steps", *SETTINGS) if mine.get(name) != theirs.get(name)
    ]  # fmt: skip


def gate(
    config: EvaluateDepthConfig, plan: GatePlan, values: Array, predictors: Sequence[tuple[str, int]]
) -> dict[str, Any]:
    """The gate's verdict on the candidate, as JSON values; nothing is promoted yet.

    Args:
        values: the deciding metric, [images, predictors]; NaN where there is no map.
    """
    verdict = judge(config, plan, values, predictors)
    if plan.pins.champion == plan.pins.candidate:
        verdict = replace(verdict, passed=False, reason="the candidate is the champion already")
    logger.info("gate: %s: %s", "passed" if verdict.passed else "not passed", verdict.reason)
    for line in (*([verdict.power] if verdict.power else []), *verdict.notes):
        logger.info("gate: %s", line)
    return {
        "metric": config.gate.metric,
        "candidate": plan.pins.candidate,
        "champion": plan.pins.champion,
        "titles": {"candidate": plan.candidate, "champion": plan.champion or None},
        "different_settings": list(plan.different),
        "verdict": verdict.to_json(),
        "promotion": None,
        "refused": None,
    }


def promote(config: EvaluateDepthConfig, plan: GatePlan, place: str, found: dict[str, Any]) -> Promotion | None:
    """Promote a candidate that passed, if it is a registered version, and add to `gate`'s findings what came of that.

    Args:
        place: as for `plan_gate`.
    """
    if not (found["verdict"]["passed"] and config.gate.promote and registered_name(plan.pins.candidate)):
        return None
    promotion = promote_candidate(plan.pins, place, alias=config.gate.champion_alias, flags=FLAGS)
    found |= {"promotion": promotion.text, "refused": str(promotion.error) if promotion.error else None}
    return promotion


def judge(config: EvaluateDepthConfig, plan: GatePlan, values: Array, predictors: Sequence[tuple[str, int]]) -> Verdict:
    """Apply every rule; arguments as for `gate`."""
    rules = config.gate
    column = {place: values[:, number] for number, place in enumerate(predictors)}
    mine = column[plan.candidate, plan.evaluations]
    failed = int(np.isnan(mine).sum())
    others = [(floor, column[floor, 0], 0.0) for floor in FLOORS]
    others += [(title, column[title, plan.evaluations], 0.0) for title in plan.must_beat]
    if plan.champion:
        others.append((CHAMPION, column[plan.champion, plan.evaluations], rules.tolerance))
    shared = min(int(np.isfinite(mine + theirs).sum()) for _, theirs, _ in others)
    found = [
        RuleResult(
            rule=f"at most {rules.most_failed} of {len(mine)} images have no map by the candidate ({failed})",
            holds=failed <= rules.most_failed, metric="failed", candidate=failed, bound=rules.most_failed,
        ),
        RuleResult(
            rule=f"at least {rules.least_images} images are compared ({shared})", holds=shared >= rules.least_images,
            metric=plan.metric,
        ),
    ]  # fmt: skip
    if plan.different:
        found.append(_alike(rules, plan.different))
    compared = {
        name: _compared(config, plan, np.stack([mine, theirs]), name, slack) for name, theirs, slack in others
    }  # fmt: skip
    return conclude(
        [*found, *compared.values()],
        against=CHAMPION if plan.champion else None,
        power=_seen(rules, plan, compared, shared),
        notes=[f"predicted differently: {'; '.join(plan.different)}"] if plan.different else [],
    )


def _alike(rules: DepthGateConfig, different: Sequence[str]) -> RuleResult:
    """Settings are the same, or are allowed to differ: an ensemble beats a single map of the same model."""
    words = "; ".join(different)
    if rules.unequal_settings:
        return RuleResult(
            rule=f"equal settings: not applied, by gate.unequal-settings ({words})", holds=True, metric="settings",
            applied=False,
        )  # fmt: skip
    return RuleResult(
        rule=f"the candidate is predicted with the settings of what it is compared with ({words}; predict anew with "
        f"equal ones, or give --{FLAGS}unequal-settings)", holds=False, metric="settings",
    )  # fmt: skip


def _compared(config: EvaluateDepthConfig, plan: GatePlan, values: Array, name: str, slack: float) -> RuleResult:
    """One rule.

    Args:
        values: of the candidate and of the other, [2, images].
    """
    both = np.isfinite(values).all(axis=0)
    if not both.any():
        return RuleResult(rule=f"candidate and {name} have maps of the same images", holds=False, metric=plan.metric)
    candidate, reference = mean_estimates(values[:, both], replicates=config.replicates)
    return compare(
        config.gate.metric, candidate, reference, metric=plan.metric, against=name, slack=slack,
        higher_is_better=higher_is_better(plan.metric), confident=config.gate.confident,
        confidence=config.gate.confidence, strictly=True,
    )  # fmt: skip


def _seen(rules: DepthGateConfig, plan: GatePlan, compared: Mapping[str, RuleResult], images: int) -> str:
    """What the images see of a difference to the champion, or to that other of which they see least, and how many
    images the wanted difference takes.

    Args:
        compared: the rules by the other's name.
    """
    known = {name: rule for name, rule in compared.items() if rule.detectable and rule.reference}
    against = CHAMPION if plan.champion else max(known, key=lambda name: known[name].detectable or 0, default="")
    if against not in known:
        return ""
    detectable, reference = known[against].detectable or 0, abs(known[against].reference or 0)
    return (
        f"{images} images see a difference of {detectable:.2g} in {plan.metric} to the {against} in "
        f"{100 * POWER:.0f} of 100 evaluations; one of {100 * rules.detect:g} % of its {reference:.4g} takes "
        f"{prompts_needed(images, detectable, rules.detect * reference):,} images"
    )
