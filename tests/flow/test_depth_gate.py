"""The gate of depth models judges image by image, and promotes only what beats floors and champion on equal terms."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2f_core.evaluation import pins
from d2f_core.evaluation.gate import prompts_needed
from d2f_core.evaluation.promotion import Promotion
from d2f_core.flow.depth import evaluation, gate
from d2f_core.flow.depth.config import DepthEvaluationError, DepthGateConfig
from d2f_core.flow.depth.errors import counted, depth_errors
from d2f_core.flow.depth.evaluation import check_evaluate_depth
from d2f_core.flow.depth.protocol import Protocol
from tests.depth_tables import true_depth, write_depth_table, write_predictions
from tests.flow.test_depth_evaluation import IMAGES, config, evaluated, predictions


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    return write_depth_table(str(tmp_path / "truth"), IMAGES)


def judged(tmp_path: Path, *outputs: str, **change: Any) -> dict[str, Any]:
    rules = DepthGateConfig(**{"candidate": "new", "champion": "", "least_images": 5, **change})
    return evaluated(config(tmp_path, *outputs, gate=rules))["gate"]


@pytest.fixture
def promoted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What was promoted; the alias names models:/depth/champion."""
    moved: list[tuple[str, str, str]] = []
    for drawing in ("draw_errors", "draw_maps"):
        monkeypatch.setattr(evaluation, drawing, lambda *arguments: b"")
    monkeypatch.setattr(pins, "pin_model", lambda uri: uri)
    monkeypatch.setattr(pins, "get_alias", lambda name, alias: "champion")
    monkeypatch.setattr(gate, "check_may_promote", lambda *arguments, **more: None)

    def promote(its: pins.Pins, output: str, *, alias: str, flags: str) -> Promotion:
        moved.append((its.candidate, alias, flags))
        return Promotion(text=f"{its.candidate} is @{alias} now")

    monkeypatch.setattr(gate, "promote_candidate", promote)
    return moved


def test_a_candidate_that_beats_floors_and_champion_is_promoted(tmp_path, names, promoted) -> None:
    outputs = (
        predictions(tmp_path, "champion", names, 0.08, crop="whole"),
        predictions(tmp_path, "new", names, 0.01, crop="whole"),
    )
    found = judged(tmp_path, *outputs, champion="auto")
    verdict = found["verdict"]
    assert (
        verdict["passed"]
        and verdict["against"] == "champion"
        and promoted == [("models:/depth/new", "champion", "gate.")]
    )
    assert [rule["rule"].split(" ")[0] for rule in verdict["rules"]] == ["at", "at", *["abs_rel@4"] * 4]
    assert all(rule["interval"] for rule in verdict["rules"][2:])
    assert (found["candidate"], found["champion"]) == ("models:/depth/new", "models:/depth/champion")
    assert found["promotion"] == "models:/depth/new is @champion now" and found["refused"] is None
    assert found["different_settings"] == [] and verdict["notes"] == ()
    assert json.loads(Path(tmp_path, "out/depth_metrics.json").read_bytes())["gate"] == json.loads(json.dumps(found))


def test_what_the_images_see_is_said_before_and_after(tmp_path, names, promoted, caplog) -> None:
    caplog.set_level(logging.INFO)
    outputs = (
        predictions(tmp_path, name, names, noise, crop="whole") for name, noise in (("old", 0.08), ("new", 0.07))
    )
    verdict = judged(tmp_path, *outputs, must_beat=("old",), detect=0.05)["verdict"]
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("gate: ")]
    assert said[0].startswith("gate: 12 images; how small a difference in abs_rel@4 they see is known when")
    assert said[2] == f"gate: {verdict['power']}"
    rule = max(verdict["rules"][2:], key=lambda rule: rule["detectable"])
    needed = prompts_needed(12, rule["detectable"], 0.05 * rule["reference"])
    assert f"12 images see a difference of {rule['detectable']:.2g} in abs_rel to the " in verdict["power"]
    assert verdict["power"].endswith(f"one of 5 % of its {rule['reference']:.4g} takes {needed:,} images")


def test_unequal_settings_are_refused_unless_a_flag_allows_them(tmp_path, names, promoted, caplog) -> None:
    """An ensemble beats a single map of the same model; the champion's and those of `must_beat` are looked at."""
    caplog.set_level(logging.INFO)
    settings = {"champion": {"ensemble": 4}, "old": {"solver": "heun"}, "new": {}}
    outputs = [
        predictions(tmp_path, name, names, 0.01 if name == "new" else 0.08, crop="whole", **its)
        for name, its in settings.items()
    ]
    found = judged(tmp_path, *outputs, champion="auto", must_beat=("old",))
    different = ["ensemble 1, the champion's 4", "solver euler, that of 'old' heun"]
    words = "; ".join(different)
    assert found["different_settings"] == different and not promoted and not found["verdict"]["passed"]
    assert [rule["holds"] for rule in found["verdict"]["rules"]] == [True, True, False, *[True] * 5]
    assert found["verdict"]["reason"].startswith("does not hold: the candidate is predicted with the settings of what")
    assert f"({words}; predict anew" in found["verdict"]["reason"]
    assert "--gate.unequal-settings" in found["verdict"]["reason"]
    assert f"gate: predicted differently: {words}" in caplog.messages
    allowed = judged(tmp_path, *outputs, champion="auto", must_beat=("old",), unequal_settings=True)["verdict"]
    assert allowed["passed"] and len(promoted) == 1 and allowed["reason"] == "all 7 rules hold"
    assert [rule["applied"] for rule in allowed["rules"]] == [True, True, False, *[True] * 5]


def test_a_champion_that_was_not_compared_is_not_replaced(tmp_path, names, promoted) -> None:
    """The pins name the version of the alias; a second command may not compare with what is easier to beat."""
    outputs = [
        predictions(tmp_path, name, names, noise, crop="whole")
        for name, noise in (("champion", 0.02), ("weak", 0.08), ("new", 0.02))
    ]
    assert not judged(tmp_path, *outputs, champion="auto")["verdict"]["passed"]
    with pytest.raises(pins.PinError, match="compares with models:/depth/champion, not with models:/depth/weak"):
        judged(tmp_path, *outputs, champion="weak")
    assert not promoted


def test_predictions_by_a_version_that_is_not_known_are_not_the_champions(
    tmp_path, names, promoted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pins, "pin_model", lambda uri: uri.replace("@x", "/champion"))
    new = predictions(tmp_path, "new", names, crop="whole")
    maps = {sample: {4: np.ones((16, 20))} for sample in names}
    old = write_predictions(str(tmp_path / "weak"), maps, model_uri="models:/depth@x", crop="whole")
    rules = DepthGateConfig(candidate="new", champion="weak")
    with pytest.raises(
        DepthEvaluationError, match=r"by 'models:/depth@x', and the champion is 'models:/depth/champion'"
    ):
        check_evaluate_depth(config(tmp_path, old, new, gate=rules))


@pytest.mark.parametrize("broken", ["draw_maps", "_results"])
def test_the_alias_does_not_move_when_the_files_cannot_be_made(
    tmp_path, names, promoted, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    kept = getattr(evaluation, broken)

    def fail(*arguments: Any) -> Any:
        if broken == "draw_maps":
            raise ValueError("no JSON: it cannot be drawn")
        return {**kept(*arguments), "images": float("nan")}

    monkeypatch.setattr(evaluation, broken, fail)
    with pytest.raises(ValueError, match="JSON"):
        judged(tmp_path, predictions(tmp_path, "new", names, crop="whole"))
    assert not promoted and not (tmp_path / "out/depth_metrics.json").exists()


def test_what_is_no_better_is_not_promoted(tmp_path, names, promoted) -> None:
    champion = predictions(tmp_path, "champion", names, 0.02, crop="whole")
    same = predictions(tmp_path, "new", names, 0.02, crop="whole")
    verdict = judged(tmp_path, champion, same, champion="auto")["verdict"]
    assert [rule["holds"] for rule in verdict["rules"]] == [True] * 5 + [False], "it beats the floors alone"
    assert not verdict["passed"] and not promoted
    tolerant = judged(tmp_path, champion, same, champion="auto", tolerance=0.9)
    assert tolerant["verdict"]["passed"] and len(promoted) == 1
    assert not judged(tmp_path, champion, same, champion="auto", tolerance=0.9, promote=False)["promotion"]


def test_a_map_that_knows_nothing_does_not_beat_the_floors(tmp_path, names, promoted) -> None:
    verdict = judged(tmp_path, predictions(tmp_path, "new", names, 50.0, crop="whole"))["verdict"]
    assert not verdict["passed"] and verdict["against"] is None and not promoted
    assert "mean depth" in verdict["reason"] and "vertical ramp" in verdict["reason"]


def test_images_without_a_map_are_a_rule_and_both_are_compared_on_what_both_have(tmp_path, names, promoted) -> None:
    champion = predictions(tmp_path, "champion", names, 0.08, crop="whole", failed=[3])
    new = predictions(tmp_path, "new", names, 0.01, crop="whole", failed=[0, 1])
    found = judged(tmp_path, champion, new, champion="champion")
    first, second, *others = found["verdict"]["rules"]
    assert first["rule"] == "at most 0 of 12 images have no map by the candidate (2)" and not first["holds"]
    assert second["rule"] == "at least 5 images are compared (9)" and second["holds"]
    assert all(rule["holds"] for rule in others) and not found["verdict"]["passed"]
    mine = [depth_errors(np.load(f"{new}/depth/{names[n]}-4.npy"), counted(true_depth(n), Protocol())) for n in
            (2, *range(4, 12))]  # fmt: skip
    assert others[-1]["candidate"] == pytest.approx(np.mean([each["abs_rel"] for each in mine]))
    assert judged(tmp_path, champion, new, champion="champion", most_failed=2)["verdict"]["passed"]
    few = judged(tmp_path, champion, new, champion="champion", most_failed=2, least_images=10)["verdict"]
    assert not few["passed"] and "at least 10 images are compared (9)" in few["reason"]


def test_deltas_are_better_when_higher(tmp_path, names, promoted) -> None:
    new = predictions(tmp_path, "new", names, 0.01, crop="whole")
    found = judged(tmp_path, new, metric="delta1@2")
    assert found["verdict"]["passed"] and "is above" in found["verdict"]["rules"][2]["rule"]


def test_a_promotion_that_is_refused_is_said_in_the_files_and_by_the_job(
    tmp_path, names, promoted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **more: Any) -> Promotion:
        return Promotion(text="Not promoted: moved", error=pins.PinError("depth@champion moved"))

    monkeypatch.setattr(gate, "promote_candidate", refuse)
    with pytest.raises(pins.PinError, match="depth@champion moved"):
        judged(tmp_path, predictions(tmp_path, "new", names, crop="whole"))
    said = json.loads(Path(tmp_path, "out/depth_metrics.json").read_bytes())["gate"]
    assert (
        said["refused"] == "depth@champion moved"
        and said["promotion"] == "Not promoted: moved"
        and said["verdict"]["passed"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate": "nobody"}, "gate.candidate names 'nobody', which is none of the predictions"),
        ({"must_beat": ("old",)}, "gate.must_beat names 'old', which is none"),
        ({"must_beat": ("champion",)}, "gate.must_beat names 'champion', as the gate calls its own. Retitle them"),
        ({"must_beat": ("new",)}, "the candidate 'new' is to beat itself"),
        ({"metric": "frechet@4"}, "gate.metric='frechet@4' is not measured here. Known: abs_rel, sq_rel"),
        ({"metric": "abs_rel@7"}, r"'new' was predicted at \[2, 4\] evaluations\. .* --gate.metric abs_rel@4"),
        ({"champion": "auto"}, r"models:/depth/champion is @champion, and none .* --model models:/depth/champion\)"),
    ],
)
def test_a_gate_that_cannot_be_asked_is_refused_before_anything_is_measured(
    tmp_path, names, promoted, change: dict[str, Any], message: str
) -> None:
    new = predictions(tmp_path, "new", names, crop="whole")
    other = write_predictions(
        str(tmp_path / "champion"), {names[0]: {4: np.ones((16, 20))}}, model_uri="x", crop="whole"
    )
    rules = DepthGateConfig(**{"candidate": "new", "champion": "", **change})
    with pytest.raises(DepthEvaluationError, match=message):
        check_evaluate_depth(config(tmp_path, new, other, gate=rules))
    assert not (tmp_path / "out/measured").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerance": 1.0}, r"gate\.tolerance=1\.0 must lie from 0"),
        ({"detect": 0.0}, r"gate\.detect=0\.0 must be above 0"),
        ({"least_images": 0}, r"gate\.least_images=0 must be at least 1"),
        ({"most_failed": -1}, r"gate\.most_failed=-1 at least 0"),
        ({"champion_alias": ""}, r"gate\.champion_alias is empty"),
        ({"metric": "abs_rel"}, "'abs_rel' is not NAME@EVALUATIONS"),
    ],
)
def test_rules_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DepthGateConfig(), **change)
