"""A depth evaluation measures whole images, in resumable parts, beside floors."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from d2f_core.flow.depth import evaluation
from d2f_core.flow.depth.config import DepthEvaluationError, EvaluateDepthConfig
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
