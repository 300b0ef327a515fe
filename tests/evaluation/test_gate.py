"""The gate passes what is better where it must be and nowhere worse than tolerated, and says why."""

from typing import Any

import numpy as np
import pytest

from d2f_core.evaluation.config import GateConfig, GateError, Limit, parse_metric
from d2f_core.evaluation.estimates import Estimate, Metric
from d2f_core.evaluation.gate import RuleResult, check_gate, expected_power, judge, prompts_needed

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


def gate(**given: Any) -> GateConfig:
    """The default rules about the deciding metric and failures, unless others are given."""
    return GateConfig(**{"must_not_regress": (), **given})


def verdict(config: GateConfig, candidate: float, champion: float, *, higher: bool = False, **others: Metric) -> bool:
    name = "recall" if higher else "frechet"
    metrics = {name: metric(name, {"candidate": {4: candidate}, "champion": {4: champion}}, higher=higher), **others}
    return judge(config, metrics, {"candidate", "champion"}).passed


@pytest.mark.parametrize(
    ("ratio", "candidate", "champion", "passes"),
    [
        (1.0, 9.9, 10, True),
        (1.0, 10, 10, False),
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
    assert verdict(gate(max_ratio=ratio), candidate, champion) is passes


@pytest.mark.parametrize(
    ("ratio", "candidate", "passes"), [(1.0, 0.51, True), (1.0, 0.5, False), (0.8, 0.63, True), (0.8, 0.62, False)]
)
def test_where_more_is_better_the_ratio_is_turned_round(ratio: float, candidate: float, passes: bool) -> None:
    config = GateConfig(metric="recall@4", max_ratio=ratio, must_not_regress=())
    assert verdict(config, candidate, 0.5, higher=True) is passes


@pytest.mark.parametrize(("candidate", "passes"), [(0.48, True), (0.47, False), (0.9, True)])
def test_other_metrics_may_get_worse_within_the_tolerance(candidate: float, passes: bool) -> None:
    recall = metric("recall", {"candidate": {10: candidate}, "champion": {10: 0.5}}, higher=True)
    assert verdict(gate(must_not_regress=("recall@10",)), 9, 10, recall=recall) is passes


def test_the_interval_of_the_paired_difference_must_keep_the_bound_by_default() -> None:
    """Draws that are not shared: candidate and champion move against each other."""
    values = {"candidate": {4: 9.9}, "champion": {4: 10.0}}
    shared = {"frechet": metric("frechet", values, noise=2)}
    opposite = Estimate.of(9.9, 9.9 - 2 * np.linspace(-1, 1, 41), 100)
    against = {**shared["frechet"].values, "candidate": {4: opposite}}
    apart = {"frechet": Metric(name="n", title="t", higher_is_better=False, values=against)}
    roles = {"candidate", "champion"}
    assert judge(gate(), shared, roles).passed, "paired: the difference is certain"
    assert not judge(gate(), apart, roles).passed
    assert judge(gate(confident=False), apart, roles).passed
    low, high = judge(gate(), apart, roles).rules[0].interval or (0, 0)
    spread = np.std(4 * np.linspace(-1, 1, 41), ddof=1)
    assert (low, high) == pytest.approx((-0.1 - 2.326 * spread, -0.1 + 2.326 * spread), abs=1e-3)


def test_what_the_prompts_can_see_stands_in_the_verdict() -> None:
    generator = np.random.default_rng(0)
    candidate = Estimate.of(9.0, 9 + generator.normal(size=4000), 250)
    champion = Estimate.of(10.0, np.full(4000, 10.0), 250)
    values = {"candidate": {4: candidate}, "champion": {4: champion}}
    metrics = {"frechet": Metric(name="n", title="t", higher_is_better=False, values=values)}
    found = judge(gate(), metrics, {"candidate", "champion"})
    assert found.rules[0].detectable == pytest.approx(2.326 + 1.282, rel=0.03)
    needed = prompts_needed(250, found.rules[0].detectable or 0, 1.0)
    assert needed == pytest.approx(250 * 3.608**2, rel=0.06)
    assert f"one of 10 % takes {needed:,} prompts" in found.power and "of the 10 compared with" in found.power


def test_what_prompts_will_see_is_said_before_anything_is_measured() -> None:
    assert expected_power(gate(), 484, 50_000) == (
        "484 prompts will see a difference of about 10 % of frechet@4 in 90 of 100 evaluations; one of 10 % "
        "takes about 484 prompts"
    )
    assert "one of 5 % takes about 1,936 prompts" in expected_power(gate(detect=0.05), 484, 50_000)
    assert expected_power(gate(), 10**6, 50_000).startswith("50,000 prompts will see a difference of about 0.98 %")
    assert "about 8.1 %" in expected_power(gate(confidence=0.95), 484, 50_000), "less is asked for"
    assert expected_power(gate(metric="recall@4"), 484, 9) == expected_power(gate(confident=False), 484, 9) == ""


@pytest.mark.parametrize(("failed", "allowed", "passes"), [(0.01, 0.0, False), (0.5, 0.0, False), (0.01, 0.01, True)])
def test_a_candidate_that_fails_on_prompts_does_not_pass_by_what_is_left(
    failed: float, allowed: float, passes: bool
) -> None:
    shares = metric("failed", {"candidate": {2: 0.0, 4: failed}, "champion": {2: 0.9, 4: 0.9}})
    assert verdict(gate(most_failed=allowed), 5, 10, failed=shares) is passes


def test_nothing_is_certain_of_a_difference_whose_spread_is_unknown() -> None:
    """Of one image, or without resampled sets, no interval can be made."""
    plain = Estimate(value=5.0, low=5.0, high=5.0, count=100), Estimate(value=10.0, low=10.0, high=10.0, count=100)
    one = tuple(Estimate.of(value, np.full(50, value), 1) for value in (5.0, 10.0))
    for candidate, champion in (plain, one):
        values = {"candidate": {4: candidate}, "champion": {4: champion}}
        metrics = {"frechet": Metric(name="n", title="t", higher_is_better=False, values=values)}
        found = judge(gate(), metrics, {"candidate", "champion"})
        assert not found.passed and "from so few images nothing is certain" in found.reason
        assert judge(gate(confident=False), metrics, {"candidate", "champion"}).passed
    assert not judge(gate(metric="nothing@4"), {}, {"candidate", "champion"}).passed, "and what is not there is unknown"


def test_an_equal_model_is_not_better() -> None:
    """The same version registered twice draws the same images: no spread, no difference."""
    assert not verdict(gate(), 10, 10)


def test_a_rule_that_cannot_be_applied_is_named_and_one_of_another_kind_counts() -> None:
    metrics = {
        "frechet": metric("frechet", {"candidate": {4: 5.0}, "champion": {4: 10.0}}),
        "flow_loss": Metric(name="f", title="f", higher_is_better=False, values={}, missing="no captions"),
    }
    roles = {"candidate", "champion"}
    found = judge(GateConfig(), metrics, roles, notes=("guidance differs",))
    assert found.passed and [rule.applied for rule in found.rules] == [True, False]
    assert found.rules[1].rule == "flow_loss: not applied, no captions" and found.notes == ("guidance differs",)
    assert found.reason == "all 1 rules hold against the champion"
    decides = judge(GateConfig(metric="flow_loss", must_not_regress=()), metrics, roles)
    assert not decides.passed, "what decides must be known"
    copies = RuleResult(rule="copies", holds=False, metric="memorised")
    assert not judge(GateConfig(), metrics, roles, also=[copies]).passed


def test_a_verdict_holds_every_rules_numbers() -> None:
    config = gate(must_not_regress=("frechet@10",), limits=(Limit(metric="failed@4", at_most=0.01),))
    metrics = {
        "frechet": metric("frechet", {"candidate": {4: 8.0, 10: 7.0}, "champion": {4: 10.0, 10: 5.0}}),
        "failed": metric("failed", {"candidate": {4: 0.02}}),
    }
    found = judge(config, metrics, {"candidate", "champion", "base"})
    assert [(rule.holds, rule.candidate, rule.reference, rule.bound) for rule in found.rules] == [
        (False, 0.02, None, 0.0), (True, 8.0, 10.0, 10.0), (False, 7.0, 5.0, 5.25), (False, 0.02, None, 0.01)
    ]  # fmt: skip
    assert not found.passed and found.against == "champion"
    assert found.reason == (
        "does not hold: at 4 evaluations the candidate fails on at most 0 of the prompts (0.02); "
        "frechet@10 of the candidate is at most 5.25 (champion 5, with 99 % confidence); "
        "failed@4 of the candidate is at most 0.01"
    )
    assert found.to_json()["rules"][1]["metric"] == "frechet_net_64d"


def test_the_first_candidate_must_beat_the_base() -> None:
    for value, passes in ((9, True), (11, False)):
        metrics = {"frechet": metric("frechet", {"candidate": {4: value}, "base": {4: 10}})}
        found = judge(gate(), metrics, {"candidate", "base"})
        assert (found.passed, found.against) == (passes, "base")
    alone = judge(gate(), {"frechet": metric("frechet", {"candidate": {4: 9}})}, {"candidate"})
    assert not alone.passed and alone.reason == "there is no champion yet, and no base to beat"


def test_or_the_first_candidate_must_keep_absolute_limits_alone() -> None:
    config = GateConfig(without_champion="limits", limits=(Limit(metric="frechet@4", at_most=9.5, at_least=0),))
    for value, passes in ((9, True), (10, False), (-1, False)):
        metrics = {"frechet": metric("frechet", {"candidate": {4: value}, "base": {4: 1}})}
        found = judge(config, metrics, {"candidate", "base"})
        assert (found.passed, found.against) == (passes, None)


def test_a_candidate_that_could_not_be_measured_does_not_pass() -> None:
    metrics = {"frechet": metric("frechet", {"champion": {4: 10}})}
    found = judge(gate(), metrics, {"candidate", "champion"})
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
    against_base = {"candidate": {0: loss}, "base": {0: 0.77}}
    metrics = {"frechet": metric("frechet", {"candidate": {4: 5}, "base": {4: 10}})}
    found = judge(config, {**metrics, "flow_loss": metric("flow_loss", against_base)}, {"candidate", "base"})
    assert found.passed is passes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GateConfig(metric="frechet"), "'frechet' is not NAME@EVALUATIONS"),
        (lambda: GateConfig(metric="flow_loss@4"), "'flow_loss@4' is not NAME@EVALUATIONS"),
        (lambda: check(GateConfig(must_not_regress=("straightness",))), "'straightness' is not measured here"),
        (lambda: GateConfig(max_ratio=0), "max_ratio=0"),
        (lambda: GateConfig(tolerance=-1), "tolerance=-1"),
        (lambda: GateConfig(tolerance=float("nan")), "tolerance=nan must be a number"),
        (lambda: GateConfig(max_ratio=float("inf")), "max_ratio=inf must be a number"),
        (lambda: Limit(metric="frechet@4", at_most=float("nan")), "the limit on frechet@4 is no number"),
        (lambda: GateConfig(memorised=1e-4), r"memorised=0\.0001 is less than can be told"),
        (lambda: GateConfig(confidence=0.5), r"confidence=0\.5 must lie between"),
        (lambda: GateConfig(detect=0), "detect=0 must be above 0"),
        (lambda: GateConfig(most_failed=1.0), r"most_failed=1\.0 must lie from 0"),
        (lambda: Limit(metric="frechet@4"), "neither at_most nor at_least"),
        (
            lambda: check(gate(metric="clip_score@4")),
            "'clip_score@4' is not measured here. Known: failed, frechet",
        ),
        (lambda: check(gate(metric="frechet@5")), r"made at \(2, 4\) evaluations. Add 5"),
        (lambda: check(gate(without_champion="limits")), "needs limits"),
        (lambda: check(gate(metric="fid@4")), "'fid@4' is a plain figure without an interval"),
        (lambda: check(gate(must_not_regress=("fid@2",))), "'fid@2' is a plain figure"),
        (
            lambda: check(gate(metric="fid@4", limits=(Limit(metric="fid@4", at_most=10),))),
            "'fid@4' is a plain figure",
        ),
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
    config = gate(limits=(Limit(metric="frechet@4", at_most=1e9), Limit(metric="failed@4", at_most=1.0)))
    found = judge(config, metrics, {"candidate", "champion"})
    assert not found.passed and [rule.holds for rule in found.rules] == [False, False, False, True]
    assert {rule.rule for rule in found.rules[1:3]} == {
        "frechet@4 of the candidate is known (too few usable images)",
    }


def test_a_plain_figure_can_have_a_limit() -> None:
    check(gate(limits=(Limit(metric="fid@4", at_most=10),)))


def check(config: GateConfig) -> None:
    check_gate(config, {"frechet", "failed"}, (2, 4), plain={"fid"})
