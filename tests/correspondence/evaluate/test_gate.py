"""The matcher's gate: floors must be beaten, the champion not be worse, and chance decides nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.matcher_gate_calibration import MadeUp, simulate
from d2f_core.correspondence.evaluate import job
from d2f_core.correspondence.evaluate.config import (
    EvaluateMatchesConfig,
    EvaluateMatchesError,
    MatcherChoice,
    MatcherGateConfig,
    ViewPairsConfig,
)
from d2f_core.correspondence.evaluate.floors import floors
from d2f_core.correspondence.evaluate.gate import expected_power, judge, pair_draws, pinned, spread_bound
from d2f_core.correspondence.evaluate.measure import Measured, measure
from d2f_core.correspondence.evaluate.scores import scores
from d2f_core.evaluation.bootstrap import percentile_interval
from d2f_core.evaluation.gate import Verdict, detectable_difference
from d2f_core.evaluation.pins import PinError
from d2f_core.tracking import get_alias, start_run
from pipelines import register_matcher
from tests.correspondence.evaluate.test_measure import PAIR
from tests.correspondence.made_views import local_views
from tests.correspondence.test_publish import CONFIG, EXPERIMENT, upload

PAIRS = [replace(PAIR, pair_id=f"pair {number}") for number in range(120)]
NAME = "gate-tests"


def right(share: float, seed: int) -> Measured:
    """A matcher that finds so large a share of the points, drawn anew for each; the others lie far off."""
    draw = np.random.default_rng(seed)

    def predict(pair, points):
        truth = torch.from_numpy(pair.target.keypoints[np.flatnonzero(pair.visible)]).double()
        hit = torch.from_numpy(draw.random(len(points)) < share)
        return torch.where(hit[:, None], truth, truth + 50), torch.ones(len(points))

    return measure(predict, PAIRS)


def verdict(candidate: Measured, champion: Measured | None = None, **fields) -> Verdict:
    config = MatcherGateConfig(candidate="a", **fields)
    others = {"champion": champion} if champion else {}
    images = [(f"{number}", f"{number}'") for number in range(len(candidate.pair_ids))]
    return judge(config, candidate, others, {"copy": right(0.3, 99)}, images=images, replicates=200, seed=0)


def test_a_floor_must_be_beaten_with_confidence() -> None:
    assert verdict(right(0.5, 1)).passed
    same = verdict(right(0.3, 99))
    assert not same.passed and "is above 0." in same.reason and "(copy 0." in same.reason
    close = verdict(right(0.36, 4))
    *_, rule = close.rules
    assert rule.candidate is not None and rule.reference is not None and rule.interval is not None
    assert rule.candidate > rule.reference and rule.interval[0] < 0 and not close.passed, "better by chance"
    assert verdict(right(0.36, 4), confident=False).passed


def unanswered(measured: Measured, wrong: float) -> Measured:
    """Its answers, of which every seventh is not finite."""
    answers = iter(measured.matches.predicted.split(int(PAIR.visible.sum())))

    def predict(pair, points):
        found = next(answers).clone()
        found[::7, 1] = wrong
        return found, torch.ones(len(points))

    return measure(predict, PAIRS)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_an_answer_that_is_not_finite_is_wrong_and_does_not_pass(wrong: float) -> None:
    """In every protocol; an evaluation of many matchers goes on."""
    perfect = right(1.0, 1)
    found = unanswered(perfect, wrong)
    points, every = int(PAIR.visible.sum()), len(found.missing)
    lost = len(PAIRS) * -(-points // 7)
    assert int(found.missing.sum()) == lost and not perfect.missing.any()
    judged = verdict(found)
    assert judged.reason == f"does not hold: no answer of the candidate is missing ({lost} of {every} points)"
    assert verdict(perfect).passed
    for protocol in scores(found, (1.0, 0.1), replicates=20, seed=0)["protocols"].values():
        assert [each["value"] for each in protocol["point"]] == pytest.approx([1 - lost / every] * 2)


def test_what_pairs_see_at_least_is_known_before_anything_is_measured() -> None:
    """The bound is kept by matchers that are as unequal as can be, each on some of the images."""
    draw = np.random.default_rng(0)
    groups = [(f"{g} {a}", f"{g} {b}") for g in range(8) for a in range(5) for b in range(5) if a != b]
    by_group, by_image = (lambda pair: pair[0].split()[0]), (lambda pair: pair[0])
    for images, side in ((groups, by_group), ([(f"{n}", f"{n}'") for n in range(120)], by_image)):
        wins = {name: draw.random() < 0.5 for name in sorted(map(side, images))}
        difference = np.array([1.0 if wins[side(pair)] else -1.0 for pair in images])
        draws = pair_draws(images, 300, 0).numpy()
        spread = np.std(draws @ difference / draws.sum(1))
        assert 0.5 * spread_bound(images) < spread < 1.1 * spread_bound(images)
        points = 100 * min(1.0, detectable_difference(spread_bound(images), 0.99))
        shown = len({name for pair in images for name in pair})
        said = expected_power(MatcherGateConfig(candidate="a"), images)
        assert f"{len(images)} pairs of {shown} images will see a difference of at most {points:.0f} points" in said
    assert expected_power(MatcherGateConfig(average="category"), groups) == ""


def test_pairs_that_share_images_are_drawn_together() -> None:
    """Of equal matchers whose images are easy or hard as wholes, few are found better: resampled pairs found 18 %."""
    draw, images = np.random.default_rng(0), 10
    pairs = [(f"{one}", f"{other}") for one in range(images) for other in range(images) if one != other]
    draws = pair_draws(pairs, 300, 1).double().numpy()
    assert ((draws > 0).sum(1) < len(pairs)).all() and np.all(draws[:, 0] == draws[:, pairs.index(("1", "0"))])
    source, target = (np.array([int(pair[side]) for pair in pairs]) for side in (0, 1))
    better = 0
    for _ in range(200):
        one, other = (
            (draw.random((len(pairs), 4)) < 1 / (1 + np.exp(-(ease[0][source] + ease[1][target])))[:, None]).mean(1)
            for ease in draw.normal(size=(2, 2, images)) * 0.8
        )
        low, _ = percentile_interval(float((one - other).mean()), draws @ (one - other) / draws.sum(1))
        better += low > 0
    assert better <= 12


def test_a_few_pairs_judge_nobody() -> None:
    few = verdict(right(1.0, 1), least_pairs=200)
    assert not few.passed and few.reason == "does not hold: at least 200 pairs are compared (120)"
    one = [("a", "b")]
    assert len(pair_draws(one, 100, 0)) < 100, "sets without a pair are left out"


def test_the_champion_must_be_beaten_or_missed_by_the_tolerance_at_most() -> None:
    champion = right(0.5, 3)
    assert not verdict(champion, champion).passed, "the same on every pair is not better"
    assert verdict(champion, champion, tolerance=0.01).passed
    assert verdict(right(0.8, 4), champion).passed and not verdict(right(0.42, 5), champion).passed
    worse = right(0.47, 6)
    assert not verdict(worse, champion).passed and verdict(worse, champion, tolerance=0.4).passed
    assert verdict(champion, champion).against == "champion" and verdict(champion).against is None


def test_of_equal_matchers_few_pass_and_one_that_is_better_by_what_can_be_seen_does() -> None:
    """Points of an image are right or wrong together, for both matchers and for each by itself."""
    found = [simulate(MadeUp(), advantage=0.0, replicates=100, seed=seed) for seed in range(200)]
    assert sum(verdict.passed for verdict, _ in found) <= 6
    detectable = np.mean([verdict.rules[-1].detectable or 0 for verdict, _ in found])
    better = [simulate(MadeUp(), advantage=0.6, replicates=100, seed=seed) for seed in range(60)]
    assert np.mean([gained for _, gained in better]) == pytest.approx(detectable, rel=0.35)
    assert np.mean([verdict.passed for verdict, _ in better]) >= 0.8
    assert "pairs of 60 images see a difference of" in better[0][0].power


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"candidate": "c"}, "gate.candidate names 'c', which is none of the matchers"),
        ({"candidate": "a", "must_beat": ("b", "d")}, "gate.must_beat names 'd'"),
        ({"candidate": "a", "must_beat": ("a",)}, "holds the candidate 'a' itself"),
        ({"tolerance": 1.0}, "gate.tolerance=1.0 must lie"),
        ({"alpha": 0.0}, "gate.alpha=0.0 must lie"),
        ({"champion_alias": ""}, "champion_alias is empty"),
        ({"confidence": 1.0}, r"gate.confidence=1\.0 must lie between"),
        ({"least_pairs": 0}, "gate.least_pairs=0 must be at least 1"),
    ],
)
def test_gates_that_judge_nothing_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(EvaluateMatchesError, match=message):
        made("out", "a", uri="x", gate=MatcherGateConfig(**fields))
    with pytest.raises(EvaluateMatchesError, match="a matcher is called 'champion'"):
        pinned(made("out", "champion", uri="x", gate=MatcherGateConfig(candidate="champion")))


def test_a_registered_candidate_may_be_named_by_its_uri() -> None:
    gate = MatcherGateConfig(candidate="models:/m@candidate")
    config = replace(
        made("out", "a", uri="x", gate=MatcherGateConfig()), uris=("models:/m@candidate", "s3://runs/c/model")
    )
    assert [each.name for each in config.compared] == ["b", "a", "m candidate", "c"]
    judged = replace(config, gate=gate).judged
    assert judged is not None and judged.name == "m candidate" and config.judged is None


def made(output: str, name: str, *, uri: str, views: str = "views", gate: MatcherGateConfig) -> EvaluateMatchesConfig:
    return EvaluateMatchesConfig(
        matchers=(MatcherChoice(name="b", uri="y", size=28), MatcherChoice(name=name, uri=uri)),
        views=ViewPairsConfig(views=views, per_range=4), output=output, replicates=50, shown=1, gate=gate,
        experiment="",
    )  # fmt: skip


def register(directory: Path, number: int, seed: int) -> str:
    run = f"s3://d2f/tests/{NAME}-{number}"
    upload(directory / "base", f"{run}/model", seed=seed, size=84)
    start_run(experiment=EXPERIMENT, run_key=run, name="run", config_yaml="", params={}, tags={})
    return register_matcher.main(replace(CONFIG, run=run, name=NAME)).version


def test_a_first_candidate_is_promoted_and_the_next_is_compared_with_it(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = local_views(tmp_path / "views")
    gate = MatcherGateConfig(candidate="a", least_pairs=20, confident=False)  # an untrained one, on a few pairs
    asked: Callable[..., EvaluateMatchesConfig] = lambda name: made(  # noqa: E731
        str(tmp_path / name), "a", uri=f"models:/{NAME}@candidate", views=views, gate=gate
    )
    assert register(tmp_path, 1, seed=0) == "1"
    config = replace(asked("all"), matchers=asked("all").matchers[1:])
    refused = job.evaluate_matches(config)["gate"]
    assert refused["candidate"] == f"models:/{NAME}/1" and refused["promotion"] is None, (
        "copying the box is perfect here"
    )
    assert "box copy" in refused["verdict"]["reason"] and get_alias(NAME, "champion") is None

    monkeypatch.setattr(job, "floors", lambda seed: dict.fromkeys(("random", "box copy"), floors(seed)["random"]))
    config = replace(config, output=str(tmp_path / "first"))
    first = job.evaluate_matches(config)
    moved = f"{NAME}@champion moved to version 1 (before: no version)"
    assert first["gate"]["promotion"] == moved, first["gate"]["verdict"]
    assert get_alias(NAME, "champion") == "1"
    page = (tmp_path / "first/report.html").read_text()
    assert ">passed</span>" in page and moved in page

    assert register(tmp_path, 2, seed=1) == "2"
    second = job.evaluate_matches(replace(config, output=str(tmp_path / "second")))
    assert [row["name"] for row in second["rows"] if row["decoding"] == "exact"] == ["champion", "a"]
    assert second["gate"]["champion"] == f"models:/{NAME}/1"
    with pytest.raises(PinError, match="evaluates the candidate"):
        job.evaluate_matches(config)
