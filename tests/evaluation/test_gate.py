"""The gate passes what is better where it must be and nowhere worse than tolerated, and says why."""

from typing import Any

import numpy as np
import pytest

from d2f_core.evaluation.config import GateConfig, GateError, Limit, parse_metric
from d2f_core.evaluation.estimates import Estimate, Metric
from d2f_core.evaluation.gate import check_gate, judge

Values = dict[str, dict[int, float]]


def metric(name: str, values: Values, *, higher: bool = False, noise: float = 0.0) -> Metric:
    def estimate(value: float) -> Estimate:
        return Estimate.of(value, value + noise * np.linspace(-1, 1, 41), 100)

    return Metric(
        name=f"{name}_net_64d",
        title=name,
        higher_is_better=higher,
        values={role: {count: estimate(value) for count, value in by.items()} for role, by in values.items()},
    )


def verdict(config: GateConfig, candidate: float, champion: float, *, higher: bool = False, **others: Metric) -> bool:
    name = "recall" if higher else "frechet"
    metrics = {name: metric(name, {"candidate": {4: candidate}, "champion": {4: champion}}, higher=higher), **others}
    return judge(config, metrics, {"candidate", "champion"}).passed


@pytest.mark.parametrize(
    ("ratio", "candidate", "champion", "passes"),
    [
        (1.0, 9.9, 10, True),
        (1.0, 10, 10, True),
        (1.0, 10.1, 10, False),
        (0.95, 9.6, 10, False),
        (0.95, 9.4, 10, True),
        (1.1, 10.9, 10, True),
        (1.0, float("nan"), 10, False),
        (1.0, -0.2, -0.1, True),
        (1.0, 0.0, -0.1, False),
    ],
)
def test_the_deciding_metric_may_be_at_most_its_ratio(
    ratio: float, candidate: float, champion: float, passes: bool
) -> None:
    assert verdict(GateConfig(max_ratio=ratio), candidate, champion) is passes


@pytest.mark.parametrize(
    ("ratio", "candidate", "passes"), [(1.0, 0.5, True), (1.0, 0.49, False), (0.8, 0.63, True), (0.8, 0.62, False)]
)
def test_where_more_is_better_the_ratio_is_turned_round(ratio: float, candidate: float, passes: bool) -> None:
    assert verdict(GateConfig(metric="recall@4", max_ratio=ratio), candidate, 0.5, higher=True) is passes


@pytest.mark.parametrize(("candidate", "passes"), [(0.48, True), (0.47, False), (0.9, True)])
def test_other_metrics_may_get_worse_within_the_tolerance(candidate: float, passes: bool) -> None:
    recall = metric("recall", {"candidate": {10: candidate}, "champion": {10: 0.5}}, higher=True)
    assert verdict(GateConfig(must_not_regress=("recall@10",)), 9, 10, recall=recall) is passes


def test_with_confidence_the_whole_interval_must_keep_the_bound() -> None:
    """Draws that are not shared: candidate and champion move against each other."""
    values = {"candidate": {4: 9.9}, "champion": {4: 10.0}}
    shared = {"frechet": metric("frechet", values, noise=2)}
    opposite = Estimate.of(9.9, 9.9 - 2 * np.linspace(-1, 1, 41), 100)
    against = {**shared["frechet"].values, "candidate": {4: opposite}}
    apart = {"frechet": Metric(name="n", title="t", higher_is_better=False, values=against)}
    roles = {"candidate", "champion"}
    assert judge(GateConfig(confident=True), shared, roles).passed, "paired: the difference is certain"
    assert not judge(GateConfig(confident=True), apart, roles).passed
    assert judge(GateConfig(), apart, roles).passed
    low, high = judge(GateConfig(), apart, roles).rules[0].interval or (0, 0)
    assert low < -3 and high > 3


def test_a_verdict_holds_every_rules_numbers() -> None:
    config = GateConfig(must_not_regress=("frechet@10",), limits=(Limit(metric="failed@4", at_most=0.01),))
    metrics = {
        "frechet": metric("frechet", {"candidate": {4: 8.0, 10: 7.0}, "champion": {4: 10.0, 10: 5.0}}),
        "failed": metric("failed", {"candidate": {4: 0.02}}),
    }
    found = judge(config, metrics, {"candidate", "champion", "base"})
    assert [(rule.holds, rule.candidate, rule.reference, rule.bound) for rule in found.rules] == [
        (True, 8.0, 10.0, 10.0), (False, 7.0, 5.0, 5.25), (False, 0.02, None, 0.01)
    ]  # fmt: skip
    assert not found.passed and found.against == "champion"
    assert found.reason == (
        "does not hold: frechet@10 of the candidate is at most 5.25 (champion 5); "
        "failed@4 of the candidate is at most 0.01"
    )
    assert found.to_json()["rules"][0]["metric"] == "frechet_net_64d"


def test_the_first_candidate_must_beat_the_base() -> None:
    for value, passes in ((9, True), (11, False)):
        metrics = {"frechet": metric("frechet", {"candidate": {4: value}, "base": {4: 10}})}
        found = judge(GateConfig(), metrics, {"candidate", "base"})
        assert (found.passed, found.against) == (passes, "base")
    alone = judge(GateConfig(), {"frechet": metric("frechet", {"candidate": {4: 9}})}, {"candidate"})
    assert not alone.passed and alone.reason == "there is no champion yet, and no base to beat"


def test_or_the_first_candidate_must_keep_absolute_limits_alone() -> None:
    config = GateConfig(without_champion="limits", limits=(Limit(metric="frechet@4", at_most=9.5, at_least=0),))
    for value, passes in ((9, True), (10, False), (-1, False)):
        metrics = {"frechet": metric("frechet", {"candidate": {4: value}, "base": {4: 1}})}
        found = judge(config, metrics, {"candidate", "base"})
        assert (found.passed, found.against) == (passes, None)


def test_a_candidate_that_could_not_be_measured_does_not_pass() -> None:
    metrics = {"frechet": metric("frechet", {"champion": {4: 10}})}
    found = judge(GateConfig(), metrics, {"candidate", "champion"})
    assert not found.passed and "frechet@4 of the candidate is known (too few usable images)" in found.reason


@pytest.mark.parametrize(
    ("name", "metric", "evaluations"),
    [("frechet@4", "frechet", 4), ("pck@0.1@1", "pck@0.1", 1), ("recall_k3@25", "recall_k3", 25)],
)
def test_a_metrics_name_may_hold_digits_dots_and_an_at(name: str, metric: str, evaluations: int) -> None:
    assert parse_metric(name) == (metric, evaluations)


@pytest.mark.parametrize(("loss", "passes"), [(0.75, True), (1.76, False)])
def test_a_candidate_that_only_knows_its_training_images_better_can_be_refused(loss: float, passes: bool) -> None:
    config = GateConfig(must_not_regress=("flow_loss",))
    values = metric("flow_loss", {"candidate": {0: loss}, "champion": {0: 0.77}})
    assert verdict(config, 5, 10, flow_loss=values) is passes
    unknown = metric("flow_loss", {"candidate": {0: loss}})
    assert not verdict(config, 5, 10, flow_loss=unknown)
    against_base = {"frechet": metric("frechet", {"candidate": {4: 5}, "base": {4: 10}}), "flow_loss": unknown}
    assert judge(config, against_base, {"candidate", "base"}).passed, "a base has no held-out loss"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GateConfig(metric="frechet"), "'frechet' is not NAME@EVALUATIONS"),
        (lambda: GateConfig(metric="flow_loss@4"), "'flow_loss@4' is not NAME@EVALUATIONS"),
        (lambda: check(GateConfig(must_not_regress=("straightness",))), "'straightness' is not measured here"),
        (lambda: GateConfig(max_ratio=0), "max_ratio=0"),
        (lambda: GateConfig(tolerance=-1), "tolerance=-1"),
        (lambda: Limit(metric="frechet@4"), "neither at_most nor at_least"),
        (
            lambda: check(GateConfig(metric="clip_score@4")),
            "'clip_score@4' is not measured here. Known: failed, frechet",
        ),
        (lambda: check(GateConfig(metric="frechet@5")), r"made at \(2, 4\) evaluations. Add 5"),
        (lambda: check(GateConfig(without_champion="limits")), "needs limits"),
    ],
)
def test_rules_that_cannot_be_applied_are_refused(make: Any, message: str) -> None:
    with pytest.raises(GateError, match=message):
        make()


def test_what_could_not_be_measured_of_the_candidate_holds_no_rule() -> None:
    metrics = {
        "frechet": metric("frechet", {"champion": {4: 10.0}}),
        "failed": metric("failed", {"candidate": {4: 0.9}}),
    }
    config = GateConfig(limits=(Limit(metric="frechet@4", at_most=1e9), Limit(metric="failed@4", at_most=1.0)))
    found = judge(config, metrics, {"candidate", "champion"})
    assert not found.passed and [rule.holds for rule in found.rules] == [False, False, True]
    assert {rule.rule for rule in found.rules[:2]} == {
        "frechet@4 of the candidate is known (too few usable images)",
    }


def check(config: GateConfig) -> None:
    check_gate(config, {"frechet", "failed"}, (2, 4))
