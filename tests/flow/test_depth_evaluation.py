"""A depth evaluation measures whole images, in resumable parts, beside floors, and its gate judges image by image."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from d2f_core.evaluation import pins
from d2f_core.evaluation.promotion import Promotion
from d2f_core.flow.depth import evaluation, gate
from d2f_core.flow.depth.config import DepthEvaluationError, DepthGateConfig, EvaluateDepthConfig
from d2f_core.flow.depth.error_parts import ERROR_SCHEMA
from d2f_core.flow.depth.errors import counted, depth_errors
from d2f_core.flow.depth.evaluation import check_evaluate_depth, evaluate_depth
from d2f_core.flow.depth.map_index import read_maps
from d2f_core.flow.depth.protocol import Protocol
from tests.depth_tables import true_depth, write_depth_table, write_predictions
from tests.flow.here import here

IMAGES = 12
GENERATOR = np.random.default_rng(0)


def noisy(noise: float, height: int = 16, width: int = 20, left: int = 0) -> list[np.ndarray]:
    """A map of each image, up to scale and shift, with noise of its own."""
    truths = (np.nan_to_num(true_depth(number), nan=5.0)[:height, left : left + width] for number in range(IMAGES))
    return [0.1 * truth + noise * GENERATOR.normal(size=truth.shape) for truth in truths]


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    return write_depth_table(str(tmp_path / "truth"), IMAGES)


def predictions(tmp_path: Path, name: str, names: list[str], noise: float = 0.01, **settings: Any) -> str:
    maps = noisy(noise) if settings.get("crop") else noisy(noise, width=16, left=2)
    by_name = {sample: {2: depth, 4: depth} for sample, depth in zip(names, maps, strict=True)}
    for failed in settings.pop("failed", ()):
        by_name[names[failed]] = {2: by_name[names[failed]][2], 4: None}
    return write_predictions(str(tmp_path / name), by_name, model_uri=f"models:/depth/{name}", **settings)


def config(tmp_path: Path, *outputs: str, **change: Any) -> EvaluateDepthConfig:
    given: dict[str, Any] = {
        "truth": str(tmp_path / "truth"), "output": str(tmp_path / "out"), "experiment": "", "replicates": 40,
        "rows_per_part": 5, "shown": 2, "titles": tuple(Path(uri).name for uri in outputs),
    }  # fmt: skip
    return EvaluateDepthConfig(predictions=outputs, **{**given, **change})


def evaluated(wanted: EvaluateDepthConfig) -> dict[str, Any]:
    with here():
        return evaluate_depth(check_evaluate_depth(wanted))


def parts_of(found: dict[str, Any]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(found["errors"]).glob("part-*.parquet")}


def test_whole_maps_are_measured_on_the_whole_truth_and_every_error_is_kept(tmp_path: Path, names: list[str]) -> None:
    one = predictions(tmp_path, "one", names, crop="whole")
    found = evaluated(config(tmp_path, one, max_depth=80.0))
    by_hand = [
        depth_errors(depth, counted(true_depth(number), Protocol(max_depth=80.0)))["abs_rel"]
        for number, depth in enumerate(np.load(f"{one}/depth/{name}-4.npy") for name in names)
    ]
    assert found["metrics"]["abs_rel"]["values"]["one"]["4"]["value"] == pytest.approx(np.mean(by_hand), rel=1e-12)
    assert (found["images"], found["left_out"], found["aspect"], found["max_depth"]) == (12, 0, "whole images", 80.0)
    assert found["protocol"] == "alignment scale_shift, truth 0.001 to 80 m, mask none, whole images"
    rows = pq.read_table(found["errors"], schema=ERROR_SCHEMA).to_pylist()
    assert len(rows) == IMAGES * 5 and {row["role"] for row in rows} == {"one", *evaluation.FLOORS}
    mine = {row["sample_id"]: row["abs_rel"] for row in rows if (row["role"], row["evaluations"]) == ("one", 4)}
    assert list(mine) == names and list(mine.values()) == pytest.approx(by_hand, rel=1e-12)


def test_beside_a_map_of_the_centre_square_only_squares_are_compared(
    tmp_path: Path, names: list[str], undrawn: None
) -> None:
    """What was predicted before whole images were known is read as it is, and is judged as it was."""
    old = predictions(tmp_path, "old", names)
    whole = predictions(tmp_path, "whole", names, crop="whole")
    alone, both = evaluated(config(tmp_path, old)), evaluated(config(tmp_path, old, whole))
    values = both["metrics"]["abs_rel"]["values"]
    assert alone["aspect"] == both["aspect"] == "centre squares"
    assert values["old"] == alone["metrics"]["abs_rel"]["values"]["old"]
    assert values["vertical ramp"] == alone["metrics"]["abs_rel"]["values"]["vertical ramp"]
    whole_alone = evaluated(config(tmp_path, whole))["metrics"]["abs_rel"]["values"]["whole"]
    assert whole_alone["4"]["value"] != values["whole"]["4"]["value"]


def test_a_killed_evaluation_goes_on_with_what_is_missing_and_another_one_does_not_meet_its_parts(
    tmp_path: Path, names: list[str], undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = predictions(tmp_path, "one", names, crop="whole")
    found = evaluated(config(tmp_path, one))
    before, text = parts_of(found), Path(tmp_path, "out/depth_metrics.json").read_bytes()
    assert list(before) and len(before) == 3
    gone = Path(found["errors"], "part-000001.parquet")
    gone.unlink()
    kept = Path(found["errors"], "part-000002.parquet").stat().st_mtime_ns
    assert evaluated(config(tmp_path, one)) == found and parts_of(found) == before
    assert Path(found["errors"], "part-000002.parquet").stat().st_mtime_ns == kept
    assert Path(tmp_path, "out/depth_metrics.json").read_bytes() == text
    measured = Path(found["errors"]).parent
    floor = (measured / "mean_depth.npy").read_bytes()
    for name in ("mean_depth.npy", "mean/part-000001.npy"):
        (measured / name).unlink()
    gone.unlink()
    assert evaluated(config(tmp_path, one)) == found and parts_of(found) == before
    assert (measured / "mean_depth.npy").read_bytes() == floor
    capped = evaluated(config(tmp_path, one, max_depth=9.0))
    assert capped["errors"] != found["errors"] and parts_of(found) == before
    monkeypatch.setattr(evaluation, "_run", lambda *arguments: pytest.fail("all parts are there"))
    assert evaluated(config(tmp_path, one)) == found


def test_an_image_without_depth_that_counts_is_named(tmp_path: Path, names: list[str]) -> None:
    one = predictions(tmp_path, "one", names, crop="whole")
    with pytest.raises(
        DepthEvaluationError, match=rf"{names[0]} of '.*truth': it has 0 pixels with a depth that count"
    ):
        evaluated(config(tmp_path, one, max_depth=0.5))


def test_maps_are_found_by_their_images_and_counted_by_their_steps(tmp_path: Path) -> None:
    depth = np.ones((16, 16))
    uri = write_predictions(
        str(tmp_path / "made"),
        {"a": {1: depth, 2: depth}, "b": {1: None, 2: depth}, "c": {1: depth, 2: depth}},
        rows_per_part=2,
    )
    model, (one, two) = read_maps(uri, {})
    assert (model, one.role, one.of_squares, two.evaluations, two.resolution) == ("a/model", "a/model", True, 2, 16)
    # Rows: a 1, b 1, a 2, b 2, then c 1, c 2.
    assert one.find(["c", "b", "nobody", "a"]).tolist() == [4, -1, -1, 0]
    assert two.find(["a", "b", "c"]).tolist() == [2, 3, 5]
    evaluations = {"a": 38, "b": 99, "c": 44}
    maps = {"a": {1: depth}, "b": {1: None}, "c": {1: depth}}
    _, (adaptive,) = read_maps(write_predictions(str(tmp_path / "adaptive"), maps, evaluations=evaluations), {})
    assert adaptive.evaluations == 41, "the mean of what an adaptive solver took"
    broken = write_predictions(str(tmp_path / "broken"), {"a": {1: depth, 2: None}, "b": {1: depth, 2: None}})
    with pytest.raises(DepthEvaluationError, match="has no map at 2 steps: all 2 failed, the first with 'the depth is"):
        read_maps(broken, {})


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are none of a test's business, and take half a second."""
    monkeypatch.setattr(evaluation, "draw_errors", lambda *arguments: b"")
    monkeypatch.setattr(evaluation, "draw_maps", lambda *arguments: b"")


def judged(tmp_path: Path, *outputs: str, **change: Any) -> dict[str, Any]:
    rules = DepthGateConfig(**{"candidate": "new", "champion": "", "least_images": 5, **change})
    return evaluated(config(tmp_path, *outputs, gate=rules))["gate"]


@pytest.fixture
def promoted(undrawn: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What was promoted; the alias names models:/depth/champion."""
    moved: list[tuple[str, str, str]] = []
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
        predictions(tmp_path, "champion", names, 0.08, crop="whole", ensemble=4),
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
    assert found["different_settings"] == ["ensemble 1, the champion's 4"]
    assert verdict["notes"] == ("predicted differently: ensemble 1, the champion's 4",)
    assert 0 < verdict["rules"][-1]["detectable"] < 0.1
    assert "12 images see a difference of" in verdict["power"]
    assert json.loads(Path(tmp_path, "out/depth_metrics.json").read_bytes())["gate"] == json.loads(json.dumps(found))


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
        ({"least_images": 0}, r"gate\.least_images=0 must be at least 1"),
        ({"most_failed": -1}, r"gate\.most_failed=-1 at least 0"),
        ({"champion_alias": ""}, r"gate\.champion_alias is empty"),
        ({"metric": "abs_rel"}, "'abs_rel' is not NAME@EVALUATIONS"),
    ],
)
def test_rules_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DepthGateConfig(), **change)
