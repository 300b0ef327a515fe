"""Matchers side by side in every protocol, beside floors, as numbers, points and a page."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from d2f_core import storage
from d2f_core.correspondence import pck
from d2f_core.correspondence.embed.config import TeacherConfig
from d2f_core.correspondence.evaluate.config import (
    EvaluateMatchesConfig,
    EvaluateMatchesError,
    MatcherChoice,
    ViewPairsConfig,
)
from d2f_core.correspondence.evaluate.job import evaluate_matches, load_pairs
from d2f_core.correspondence.evaluate.matchers import build_matcher
from d2f_core.correspondence.evaluate.measure import floors, measure, predict_by
from d2f_core.correspondence.evaluate.pictures import HEIGHT, Line, draw_pair
from d2f_core.correspondence.evaluate.scores import point_table, scores
from d2f_core.correspondence.student import StudentError
from d2f_core.data.sources.config import PairSource
from tests.correspondence.evaluate.test_measure import BACK, PAIR, matcher
from tests.correspondence.made_views import local_views, write_views
from tests.correspondence.test_student import write

LITE0 = TeacherConfig(name="lite0", kind="efficientnet-lite0", size=64, normalisation="efficientnet-lite")


def test_scores_are_those_of_pck_with_intervals_around_them() -> None:
    measured = measure(predict_by(matcher()), [PAIR, BACK])
    found = scores(measured, (0.1, 0.01), replicates=50, seed=0)
    for name, protocol in pck.PROTOCOLS.items():
        once = pck.pck(measured.matches, protocol.scoring, (0.1, 0.01))
        for average in ("point", "image", "category"):
            values = found["protocols"][name][average]
            assert [each["value"] for each in values] == once.average(average)[0].tolist()
            assert all(each["low"] <= each["value"] <= each["high"] for each in values)
    assert found["by_viewpoint"] == {"30-60": 1.0, "120-180": 1.0} and found["by_category"] == {"patch": 1.0}
    assert found["sides"] == {"points": 4, "confused": 0}
    assert np.all(np.diff([value for _, value in found["curve"]]) >= 0)
    assert json.loads(json.dumps(found)) == found


def test_a_matcher_that_takes_left_for_right_is_told() -> None:
    def mirrored(pair, points):
        found = torch.from_numpy(pair.target.keypoints[[1, 0, 2]])
        return found.double(), torch.ones(len(points))

    assert scores(measure(mirrored, [PAIR]), (0.1,), replicates=10, seed=0)["sides"] == {"points": 2, "confused": 2}


def test_every_point_has_a_row() -> None:
    measured = measure(floors()["box copy"], [PAIR, BACK])
    rows = point_table("box copy", "floor", measured).to_pylist()
    assert len(rows) == 6 and rows[3]["pair_id"] == "b-a" and rows[3]["keypoint"] == 0
    assert max(row["error"] for row in rows) < 1e-5 and rows[0]["viewpoint"] == 30


def test_a_drawing_shows_where_points_were_found_and_where_they_are() -> None:
    assert PAIR.source is not None and PAIR.target is not None
    places = [(PAIR.source.keypoints[0], PAIR.target.keypoints[0]), (PAIR.source.keypoints[2], np.array([5.0, 5.0]))]
    lines = [
        Line(
            source=source, predicted=found, truth=PAIR.target.keypoints[number * 2], guess=np.zeros(2), right=not number
        )
        for number, (source, found) in enumerate(places)
    ]
    drawn = np.asarray(draw_pair(PAIR, lines)).astype(int)
    assert drawn.shape[0] == HEIGHT
    green, red = ((drawn - colour).__abs__().sum(axis=2) < 6 for colour in ((26, 152, 80), (215, 48, 39)))
    assert green.sum() > 300 and red.sum() > 300


def config(tmp_path: Path, views: str, **fields) -> EvaluateMatchesConfig:
    dino = str(write(tmp_path / "dino", "dinov2"))
    teacher = TeacherConfig(name="dino", uri=dino, size=28, layers=2)
    return EvaluateMatchesConfig(
        matchers=(
            MatcherChoice(name="lite0 + dino", teachers=(LITE0, teacher), shares=(3.0, 1.0)),
            MatcherChoice(name="dino", uri=dino, size=42),
        ),
        views=ViewPairsConfig(views=views, per_range=2), output=str(tmp_path / "out"), replicates=20, shown=2, **fields,
    )  # fmt: skip


def test_teachers_together_match_on_the_finest_of_their_grids(tmp_path: Path) -> None:
    made = config(tmp_path, local_views(tmp_path / "views"))
    fused, plain = (build_matcher(choice) for choice in made.matchers)
    assert fused.grid == (4, 4) and plain.grid == (3, 3)
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert fused.features([image]).shape == (1, 16, 304 + 24) and plain.features([image]).shape == (1, 9, 24)
    with pytest.raises(EvaluateMatchesError, match="give its size in pixels"):
        build_matcher(replace(made.matchers[1], size=0))
    with pytest.raises(StudentError, match=r"size=41 of 'dino' is no multiple of its patch of 14 pixels\. Use 28"):
        build_matcher(replace(made.matchers[1], size=41))


def test_pairs_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    made = config(tmp_path, write_views(str(tmp_path / "views")))
    with pytest.raises(EvaluateMatchesError, match="has no pair with a keypoint"):
        load_pairs(replace(made, views=replace(made.views, split="test")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"matchers": ()}, "Give at least one"),
        ({"output": ""}, "output is empty"),
        ({"alphas": (0.1, 0.0)}, "must lie above 0"),
        ({"pairs": PairSource(uri="p")}, "give either pairs.uri or views.views"),
        ({"replicates": 0}, "replicates=0 must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, fields: dict, message: str) -> None:
    with pytest.raises(EvaluateMatchesError, match=message):
        replace(config(tmp_path, "views"), **fields)
    twice = {"name": "a", "teachers": (LITE0,), "shares": (1.0, 2.0)}
    for wrong in ({"name": "a/b", "uri": "x"}, {"name": "a"}, {"name": "a", "uri": "x", "teachers": (LITE0,)}, twice):
        with pytest.raises(EvaluateMatchesError):
            MatcherChoice(**wrong)  # type: ignore[arg-type]


def test_matchers_are_compared_on_views(cluster: None, tmp_path: Path) -> None:
    made = config(tmp_path, local_views(tmp_path / "views"), experiment="matches")
    result = evaluate_matches(made)
    names = [(row["name"], row["decoding"]) for row in result["rows"]]
    assert names == [
        *((floor, "floor") for floor in ("random", "same pixel", "box copy")),
        *((name, how) for name in ("lite0 + dino", "dino") for how in ("exact", "published")),
    ]
    assert json.loads(storage.read_bytes(f"{made.output}/scores.json")) == result
    points = pq.read_table(io.BytesIO(storage.read_bytes(f"{made.output}/points.parquet")))
    assert len(points) == sum(row["points"] for row in result["rows"])
    page = storage.read_bytes(f"{made.output}/report.html").decode()
    assert page.count("<img") == 4 and "http" not in re.sub(r'"data:[^"]*"', "", page)
    (run,) = mlflow.search_runs(experiment_names=["matches"], output_format="list")
    assert "box_copy/floor/pck_0.1" in run.data.metrics and "lite0_and_dino/exact/pck_0.1" in run.data.metrics
