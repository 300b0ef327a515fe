"""Matchers side by side in every protocol, beside floors, as numbers, points and a page."""

import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from d2f_core import storage
from d2f_core.batch.output import OutputError
from d2f_core.correspondence import pck
from d2f_core.correspondence.artifact import MatcherDescription, MatcherError, upload_matcher
from d2f_core.correspondence.config import StudentConfig
from d2f_core.correspondence.convolution_teacher import ConvolutionTeacher
from d2f_core.correspondence.embed.config import TeacherConfig
from d2f_core.correspondence.evaluate.actor import MatchScorer, groups
from d2f_core.correspondence.evaluate.answers import claim_output, digest, missing, read_answers
from d2f_core.correspondence.evaluate.chunks import cut
from d2f_core.correspondence.evaluate.config import (
    EvaluateMatchesConfig,
    EvaluateMatchesError,
    MatcherChoice,
    MatcherGateConfig,
    ViewPairsConfig,
    names_of,
)
from d2f_core.correspondence.evaluate.floors import floors
from d2f_core.correspondence.evaluate.job import check_matches, check_trained, evaluate_matches, load_pairs
from d2f_core.correspondence.evaluate.matchers import build_matcher, build_matchers
from d2f_core.correspondence.evaluate.measure import measure, predict_by
from d2f_core.correspondence.evaluate.pictures import HEIGHT, Line, draw_pair
from d2f_core.correspondence.evaluate.report import gains, percent
from d2f_core.correspondence.evaluate.scores import point_table, scores
from d2f_core.correspondence.evaluate.view_pairs import pairs_of_views
from d2f_core.correspondence.matching import Decoding
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.student import StudentError, add_adapters, load_network, trained
from d2f_core.data.sources.config import PairSource
from d2f_core.evaluation.bootstrap import bootstrap_counts
from d2f_core.model.base import described_copy
from tests.correspondence.evaluate.test_measure import BACK, PAIR, matcher
from tests.correspondence.made_views import local_views, write_views
from tests.correspondence.tiny_transformers import write

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
    assert found["viewpoint_pairs"] == {"0-30": 0, "30-60": 1, "60-120": 0, "120-180": 1}
    assert found["sides"] == {"points": 4, "confused": 0}
    category = found["categories"]["patch"]
    assert (category["pairs"], category["points"]) == (2, 6) and category["pck"] == found["protocols"]["original"][
        "point"
    ]
    assert np.all(np.diff([value for _, value in found["curve"]]) >= 0)
    assert json.loads(json.dumps(found)) == found


def test_a_category_that_was_held_out_has_a_score_of_its_own() -> None:
    other = replace(BACK, category="unseen")

    def only_the_first(pair, points):
        right = torch.from_numpy(pair.target.keypoints[pair.visible]).double()
        return (right if pair is PAIR else right + 40), torch.ones(len(points))

    found = scores(measure(only_the_first, [PAIR, other]), (0.1, 0.05), replicates=20, seed=0)
    values = {
        name: [(each["alpha"], each["value"]) for each in its["pck"]] for name, its in found["categories"].items()
    }
    assert values == {"patch": [(0.1, 1.0), (0.05, 1.0)], "unseen": [(0.1, 0.0), (0.05, 0.0)]}
    assert found["by_category"] == {"patch": 1.0, "unseen": 0.0}


def test_a_category_that_no_resampled_set_holds_has_its_value_as_interval() -> None:
    other = replace(BACK, category="rare")
    pairs = [replace(PAIR, pair_id=str(number)) for number in range(9)]
    measured = measure(predict_by(matcher()), [*pairs, other])
    seed = next(seed for seed in range(20) if not bootstrap_counts(10, 1, seed)[0, 9])
    (rare,) = scores(measured, (0.1,), replicates=1, seed=seed)["categories"]["rare"]["pck"]
    assert rare["low"] == rare["value"] == rare["high"] == 1.0


def test_the_report_tells_what_a_decoding_adds() -> None:
    def row(name: str, decoding: str, *values: float) -> dict:
        points = [{"value": value} for value in values]
        return {"name": name, "decoding": decoding, "protocols": {"original": {"point": points}}}

    rows = [row("HOG", "floor", 0.1, 0.1), row("a", "exact", 0.5, 0.25), row("a", "published", 0.375, 0.25)]
    assert gains(rows) == [{"name": "a", "exact": [0.5, 0.25], "added": {"published": [-0.125, 0.0]}}]
    assert [percent(value) for value in (0.1234, -0.0001, float("nan"), None)] == ["12.3", "0.0", "-", "-"]
    assert [percent(value, "+") for value in (-0.125, 0.01)] == ["-12.5", "+1.0"]


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


def trained_matcher(tmp_path: Path) -> str:
    """As a training leaves it, its adapters drawn."""
    student = StudentConfig(base=str(tmp_path / "dino"), rank=2)
    network = add_adapters(load_network(student), student, seed=0)
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(value.shape, generator=draw) * 0.1 for name, value in trained(network)}
    description = MatcherDescription(
        student=student, base_hash=described_copy(student.base).hash(), preparation=Preparation(size=28),
        decoding=Decoding(), training={},
    )  # fmt: skip
    return upload_matcher(str(tmp_path / "student/model"), weights, description)


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


def test_matchers_that_share_a_teacher_are_asked_one_after_another() -> None:
    other, third = (replace(LITE0, name=name) for name in ("other", "third"))
    choices = [
        MatcherChoice(name=str(number), teachers=teachers)
        for number, teachers in enumerate([(LITE0,), (third,), (other,), (LITE0, other)])
    ]
    assert groups(choices) == [[1], [0, 2, 3, 4]], "the last number is the floor's"
    assert groups(choices[:2]) == [[0], [1, 2]]


def test_a_teacher_is_asked_once_by_matchers_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    features = ConvolutionTeacher.features
    monkeypatch.setattr(
        ConvolutionTeacher, "features", lambda self, images: asked.append(len(images)) or features(self, images)
    )
    choices = [MatcherChoice(name=name, teachers=(LITE0,)) for name in ("a", "b")]
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    first, second = (matcher.features([image]) for matcher in build_matchers(choices))
    assert asked == [1] and torch.equal(first, second)
    assert torch.equal(first, build_matcher(choices[0]).features([image]))


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        (["s3://d2f/runs/distill-demo/model"], ["distill-demo"]),
        (["s3://r/seed1/distill/model", "s3://r/seed2/distill/model/"], ["seed1", "seed2"]),
        (["s3://r/seed1/distill/model", "s3://r/seed2/refine/model"], ["seed1 distill", "seed2 refine"]),
        (["/runs/a b", "/runs/c"], ["a-b", "c"]),
        (["models:/m@a", "models:/m/a", "/runs/c", "models:/m/3"], ["m a", "m version a", "c", "m version 3"]),
    ],
)
def test_matchers_are_named_by_what_tells_their_uris_apart(uris: list[str], names: list[str]) -> None:
    assert names_of(uris) == names


def test_uris_that_name_no_trained_matchers_are_refused(tmp_path: Path) -> None:
    made = config(tmp_path, local_views(tmp_path / "views"))
    for wrong in (("/a/model", "/a"), ("",)):
        with pytest.raises(EvaluateMatchesError, match=r"must each name another directory"):
            replace(made, uris=wrong)
    with pytest.raises(EvaluateMatchesError, match=r"a name of its own, and none of random, same pixel, box copy, HOG"):
        replace(made, uris=("/runs/dino/model",))
    bare = made.matchers[1].uri
    with pytest.raises(MatcherError, match=r"holds no matcher\.json\. Give the directory of a trained matcher"):
        check_trained(replace(made, matchers=(), uris=(bare,)))
    gate = MatcherGateConfig(candidate=bare)
    with pytest.raises(MatcherError, match=r"holds no matcher\.json"):
        evaluate_matches(replace(made, matchers=(), uris=(bare,), size=28, gate=gate))


def test_what_decides_a_matchers_answers_is_described(tmp_path: Path) -> None:
    made = config(tmp_path, local_views(tmp_path / "views"))
    found = check_matches(made)
    assert list(found) == ["lite0 + dino", "dino"] and found["dino"]["size"] == 42
    larger = replace(made, matchers=(made.matchers[0], replace(made.matchers[1], size=28)))
    assert check_matches(larger)["lite0 + dino"] == found["lite0 + dino"]
    assert check_matches(larger)["dino"] != found["dino"]
    with pytest.raises(EvaluateMatchesError, match="give its size in pixels"):
        check_matches(replace(made, matchers=(replace(made.matchers[1], size=0),)))


def test_pairs_have_a_digest_of_all_that_decides() -> None:
    other = replace(PAIR, visible=np.array([True, True, False, False]))
    assert PAIR.target is not None
    moved = replace(PAIR, target=replace(PAIR.target, keypoints=PAIR.target.keypoints + np.float32(0.5)))
    assert digest([PAIR]) == digest([replace(PAIR)])
    assert len({digest(each) for each in ([PAIR], [BACK], [PAIR, BACK], [BACK, PAIR], [other], [moved])}) == 6


def files(output: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(f"{output}/{name}") for name in ("points.parquet", "scores.json", "report.html")}


def test_matchers_are_compared_on_views(cluster: None, tmp_path: Path) -> None:
    """By two actors, by one alone, and by one that finds all parts but the last: the files are the same."""
    write(tmp_path / "dino", "dinov2")
    sizes = {"chunk_size": 8, "batch_size": 3, "num_actors": 2}
    uris, views = (trained_matcher(tmp_path),), local_views(tmp_path / "views")
    made = config(tmp_path, views, experiment="matches", uris=uris, pose_align=True, **sizes)
    result = evaluate_matches(made)
    names = [(row["name"], row["decoding"]) for row in result["rows"]]
    ways = ("exact", "published", "exact, pose-aligned")
    assert names == [
        *((floor, "floor") for floor in ("random", "same pixel", "box copy", "HOG")),
        *((name, how) for name in ("lite0 + dino", "dino", "student") for how in ways),
    ]
    assert json.loads(storage.read_bytes(f"{made.output}/scores.json")) == result
    assert "flip partners" in result["labels"]["exact, pose-aligned"]
    flipped = {row["decoding"] for row in result["rows"] if row["flipped"]}
    assert flipped == {"exact, pose-aligned"}
    points = pq.read_table(io.BytesIO(storage.read_bytes(f"{made.output}/points.parquet")))
    assert len(points) == sum(row["points"] for row in result["rows"])
    page = storage.read_bytes(f"{made.output}/report.html").decode()
    assert page.count("<img") == 4 and "http" not in re.sub(r'"data:[^"]*"', "", page)
    assert "flip partners" in page
    (run,) = mlflow.search_runs(experiment_names=["matches"], output_format="list")
    assert "box_copy/floor/pck_0.1" in run.data.metrics and "lite0_and_dino/exact/pck_0.1" in run.data.metrics

    first, parts = files(made.output), storage.list_names(f"{made.output}/answers")
    assert len(parts) == 3 * 2, "three groups of matchers, a chunk for each category"
    alone = replace(made, output=str(tmp_path / "alone"), num_actors=1, experiment="")
    assert evaluate_matches(alone) == result and files(alone.output) == first

    gone = Path(made.output, "answers", parts[-1])
    gone.unlink()
    there = {name: Path(made.output, "answers", name).stat().st_mtime_ns for name in parts[:-1]}
    assert evaluate_matches(replace(made, experiment="")) == result and files(made.output) == first
    assert gone.exists() and there == {
        name: Path(made.output, "answers", name).stat().st_mtime_ns for name in parts[:-1]
    }
    with pytest.raises(
        OutputError, match=r"holds the results of another job \(matcher 1 dino was .*Give another output"
    ):
        evaluate_matches(replace(made, matchers=(made.matchers[0], replace(made.matchers[1], size=28))))


def test_a_complete_evaluation_is_scored_anew_without_an_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cluster, because none is asked for; the first pair has a damaged image."""
    made = config(tmp_path, local_views(tmp_path / "views"), experiment="", chunk_size=8)

    def one_damaged(views, **how):
        first, *others = pairs_of_views(views, **how)
        return [replace(first, source=replace(first.source, data=first.source.data[:60])), *others]

    monkeypatch.setattr("d2f_core.correspondence.evaluate.job.pairs_of_views", one_damaged)
    loaded = load_pairs(made)
    pairs, (damaged,) = loaded.pairs, loaded.ledger
    monkeypatch.setattr("d2f_core.correspondence.evaluate.chunks.TILE", 1)
    chunks = cut(pairs, chunk_size=8, batch_size=1)
    assert [number for chunk in chunks for number in chunk.numbers] != list(range(len(pairs)))
    monkeypatch.setattr("ray.get", lambda chunk: chunk)
    claim_output(
        made.output, check_matches(made), pairs, images=loaded.images, batch_size=1, chunk_size=8, pose_align=False
    )
    scorer = MatchScorer(made, chunks)  # type: ignore[arg-type]
    for group, chunk in missing(made.output, len(groups(made.compared)), len(chunks)):
        scorer({"group": np.array([group]), "chunk": np.array([chunk])})
    result = evaluate_matches(replace(made, alphas=(0.2,)))
    ledger = pq.read_table(f"{made.output}/quarantine.parquet").to_pylist()
    assert ledger == [asdict(damaged)] and (result["left_out"], result["pairs"]) == (1, len(pairs))
    assert "1 left out" in Path(made.output, "report.html").read_text()
    assert result["alphas"] == [0.2] and evaluate_matches(made)["alphas"] == [0.1, 0.05, 0.01]
    exact = measure(predict_by(build_matcher(made.matchers[1])), pairs)
    found = read_answers(made.output, len(groups(made.compared)), len(chunks), pairs)[1, "exact"]
    assert torch.equal(found.matches.predicted, exact.matches.predicted), "in the order of the pairs"
    assert torch.equal(found.confidence, exact.confidence) and found.pair_ids == exact.pair_ids
