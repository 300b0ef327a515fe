"""What jobs refuse before anything is made: prompts, models and tables that do not go together."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from d2f_core.data.manifest import Manifest, ManifestError, write_manifest, write_part
from d2f_core.flow.depth.actor import DEPTH_INDEX_SCHEMA
from d2f_core.flow.depth.config import DepthEvaluationError, EvaluateDepthConfig
from d2f_core.flow.depth.evaluation import check_evaluate_depth, evaluate_depth
from d2f_core.flow.evaluate.compared_models import make_compared_model
from d2f_core.flow.evaluate.config import EvaluateConfig, EvaluateError, MeasureConfig, ScoreConfig
from d2f_core.flow.evaluate.extract_features import extract_features
from d2f_core.flow.evaluate.job import read_reference
from d2f_core.flow.generate.actor import index_schema
from d2f_core.flow.generate.config import ContactSheetConfig, GenerateConfig
from d2f_core.flow.generate.contact_sheet import check_contact_sheet
from d2f_core.flow.generate.job import check_generate
from d2f_core.flow.generate.plan import make_plan
from d2f_core.flow.generate.prompts import checked_rows, scan_prompts
from d2f_core.flow.publish.config import PromoteConfig, RegisterConfig
from d2f_core.flow.publish.job import check_register, exported_model, move_alias
from d2f_core.model.artifact import load_model
from d2f_core.model.config import LoraConfig
from d2f_core.registration import RegisterError
from tests.depth_tables import true_depth, write_depth_table
from tests.flow.here import here
from tests.flow.tiny_base import write_tiny_base
from tests.image_tables import write_images
from tests.model.artifacts import trained


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model that samples by a solver which chooses its own steps."""
    target = tmp_path_factory.mktemp("model") / "model"
    return Path(trained(base, target, LoraConfig(rank=2), solver="dopri5", steps=1, guidance=1.0))


def prompts(tmp_path: Path, **row: Any) -> str:
    """A prompt file whose second row has settings of its own."""
    rows = [{"prompt": "a cat"}, {"prompt": "a dog", **row}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(each) for each in rows))
    return str(tmp_path / "prompts.jsonl")


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        ({"height": 17}, {}, r"prompts.jsonl' row 2: height=17 must be a multiple of the autoencoder's 2 pixels"),
        ({"height": 16, "width": 9}, {}, r"row 2: width=9 must be a multiple"),
        ({"width": 32}, {"emit": "latents"}, "row 2 has a size of its own, but latents of one table have one shape"),
        ({}, {"resolution": 17}, "resolution=17: height=17 must be a multiple"),
        ({}, {"resolution": 0}, "resolution=0: height=0 must be a multiple"),
        ({}, {"guidance": float("nan")}, "guidance=nan must be a number"),
        ({}, {"shift": 0.0}, "shift=0.0 must be a number above 0"),
        ({}, {"time_grid": "even"}, "time_grid='even' is not known. Use one of uniform, beta"),
        ({}, {"model": ""}, "model is empty. Give --model URI"),
    ],
)
def test_a_generation_that_a_model_cannot_draw_is_refused_with_the_row(
    base: Path, tmp_path: Path, row: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    config = {"prompts": prompts(tmp_path, **row), "model": str(base), "output": str(tmp_path / "out"), "steps": (2,)}
    with pytest.raises(ValueError, match=message):
        check_generate(GenerateConfig(**{**config, **change}))


@pytest.mark.parametrize(
    ("role", "row", "change", "message"),
    [
        ("candidate", {}, {}, "the candidate's solver 'dopri5' chooses its own steps. Give one of ddim, .*euler"),
        ("base", {}, {"base_solver": "bosh3"}, "the base's solver 'bosh3' chooses its own steps"),
        (
            "candidate",
            {},
            {"solver": "rk4"},
            r"rk4 takes 4 evaluations a step, so \[2\] cannot be made. Leave them out",
        ),
        (
            "base",
            {"steps": 3},
            {},
            "has rows with their own steps, which an evaluation varies. Remove the column steps",
        ),
    ],
)
def test_models_are_compared_only_at_equal_numbers_of_evaluations(
    base: Path, model: Path, tmp_path: Path, role: str, row: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    config = EvaluateConfig(
        prompts=prompts(tmp_path, **row), output=str(tmp_path / "out"), evaluations=(2, 4), guidance=1.0, **change
    )
    with pytest.raises(EvaluateError, match=message):
        make_compared_model(config, role, str(base if role == "base" else model), None)


def test_a_compared_model_makes_so_many_steps_that_evaluations_are_equal(model: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(
        prompts=prompts(tmp_path), output=str(tmp_path / "out"), evaluations=(4, 8), guidance=1.0, solver="rk4"
    )
    found = make_compared_model(config, "candidate", str(model), None)
    assert found.job.plan.steps == (1, 2) and [found.steps(count) for count in (4, 8)] == [1, 2]
    assert found.images == f"{config.output}/generations/candidate"


def test_real_images_must_be_images_and_enough_for_the_neighbours(tmp_path: Path) -> None:
    measure = MeasureConfig(neighbours=3)
    few = write_images(str(tmp_path / "few"), 15)
    with pytest.raises(EvaluateError, match=r"few' has 15 images. Give 16 or more"):
        read_reference(EvaluateConfig(reference=few, training="", measure=measure))
    enough = write_images(str(tmp_path / "enough"), 16)
    assert read_reference(EvaluateConfig(reference=enough, training="")).num_rows == 16
    write_depth_table(str(tmp_path / "depth"), 2)
    with pytest.raises(EvaluateError, match=r"is a table of depth\. Give real images"):
        read_reference(EvaluateConfig(reference=str(tmp_path / "depth"), training=""))
    with pytest.raises(EvaluateError, match=r"depth' is a table of depth\. Give the images trained on"):
        read_reference(EvaluateConfig(reference=few, training=str(tmp_path / "depth")))


def test_features_of_other_networks_are_not_taken_for_these(tmp_path: Path) -> None:
    images = write_images(str(tmp_path / "images"), 2)
    output = str(tmp_path / "features")
    file = write_part(output, "part-000000.parquet", pa.table({"a": [1, 2]}))
    write_manifest(output, Manifest(kind="features", files=(file,), fingerprint={"network": "another"}))
    with pytest.raises(
        ManifestError, match=r"features' holds features of other images or networks. Give another output"
    ):
        extract_features({output: images}, ScoreConfig(), {"network": "this"})


@pytest.mark.parametrize("given", [{"generations": ("x",)}, {"output": "x.png"}])
def test_a_sheet_of_nothing_or_to_nowhere_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"generations or output is empty. Give --generations URI URI and --output FILE"
    ):
        check_contact_sheet(ContactSheetConfig(**given))


def test_a_model_that_was_not_exported_cannot_be_registered(tmp_path: Path) -> None:
    with pytest.raises(RegisterError, match=r"run is empty. Give --run URI, the output of a training"):
        check_register(RegisterConfig())
    run = RegisterConfig(run=str(tmp_path))
    with pytest.raises(
        RegisterError, match=r"model' holds no exported model \(it has no diff2flow.json\). Run .*finetune"
    ):
        exported_model(run)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/diff2flow.json").write_text("{}")
    assert exported_model(run) == str(tmp_path / "model")


def test_an_alias_moves_only_to_a_version_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2f_core.flow.publish.job.check_tracking", lambda: None)
    with pytest.raises(RegisterError, match=r"version is empty. Give --version N, or --rollback"):
        move_alias(PromoteConfig())


def write_predictions(uri: Path, names: list[str], *, error: str | None = None, task: str = "image_to_depth") -> str:
    """A finished output of predict_depth, of one map for each name; `error`: why the last one has none."""
    uri.mkdir()
    plain = {"width": 20, "height": 16, "crop": [2, 0, 18, 16], "resolution": 16, "solver": "euler", "steps": 1}
    plain |= {"shift": 1.0, "ensemble": 1, "seed": 0, "num_evaluations": 1, "model_uri": "a/model", "model_hash": ""}
    rows = []
    for number, name in enumerate(names):
        np.save(uri / f"{number}.npy", true_depth(number)[:, 2:18].clip(0, 9))
        rows.append({"sample_id": name, "source_uri": "x", "depth_uri": str(uri / f"{number}.npy"), **plain})
    rows[-1] |= {"error": error, "depth_uri": None} if error else {}
    file = write_part(str(uri), "index/part-000000.parquet", pa.Table.from_pylist(rows, DEPTH_INDEX_SCHEMA))
    write_manifest(str(uri), Manifest(kind="generations", files=(file,), fingerprint={"task": task}))
    return str(uri)


def depth_config(tmp_path: Path, *predictions: str, **change: Any) -> EvaluateDepthConfig:
    given = {"truth": str(tmp_path / "truth"), "output": str(tmp_path / "out"), "experiment": "", "replicates": 20}
    return EvaluateDepthConfig(predictions=predictions, **{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": ""}, r"truth is empty\. Give --truth URI"),
        ({"output": ""}, r"output is empty\. Give --output URI"),
        ({"predictions": ()}, r"predictions is empty\. Give --predictions URI"),
        ({"predictions": ("images",)}, "images' holds no depth maps. Give an output of pipelines.predict_depth"),
        ({"predictions": ("a", "b")}, "'b' is a second output of 'a/model'. Tell them apart: --titles A B"),
        ({"truth": "a"}, "a' is a table of generations, not of depth. Give a depth table"),
        ({"train": "b"}, "b' is a table of generations, not of depth"),
    ],
)
def test_a_depth_evaluation_of_what_does_not_belong_together_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    names = write_depth_table(str(tmp_path / "truth"), 2)
    for name, task in (("a", "image_to_depth"), ("b", "image_to_depth"), ("images", "text_to_image")):
        write_predictions(tmp_path / name, names, task=task)
    monkeypatch.chdir(tmp_path)
    config = {"predictions": ("a",), "truth": "truth", "output": "out", "experiment": ""}
    with pytest.raises(DepthEvaluationError, match=message):
        check_evaluate_depth(EvaluateDepthConfig(**{**config, **change}))


def test_images_without_a_map_of_every_model_are_left_out_and_counted(tmp_path: Path) -> None:
    names = write_depth_table(str(tmp_path / "truth"), 4)
    one = write_predictions(tmp_path / "one", names)
    other = write_predictions(tmp_path / "other", names[:3], error="not finite")
    with here():
        found = evaluate_depth(check_evaluate_depth(depth_config(tmp_path, one, other, titles=("one", "other"))))
    assert found["images"] == 2 and found["left_out"] == 2
    assert set(found["metrics"]["abs_rel"]["values"]) == {"one", "other", "constant", "vertical ramp", "mean depth"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "depth.png",
        "depth_sheet.png",
        "depth_metrics.json",
        "measured",
    }
    stranger = write_predictions(tmp_path / "stranger", ["another image"])
    with (
        here(),
        pytest.raises(
            DepthEvaluationError, match=r"has a map by every model \(4 have not\). Predict the depth of this"
        ),
    ):
        evaluate_depth(check_evaluate_depth(depth_config(tmp_path, one, stranger, titles=("one", "other"))))


@pytest.mark.parametrize(("carried", "asked", "used"), [("beta", None, "beta"), ("beta", "uniform", "uniform")])
def test_a_generation_is_on_the_models_grid_unless_another_is_asked_for(
    base: Path, tmp_path: Path, carried: str, asked: Any, used: str
) -> None:
    """The plan and the index name a grid only where it is not the one that all had before there were two."""
    model = trained(base, tmp_path / "model", LoraConfig(rank=2), guidance=1.0, time_grid=carried)
    asking = {"prompts": prompts(tmp_path), "model": model, "output": str(tmp_path / "out")}
    config = GenerateConfig(**asking, time_grid=asked)
    plan = make_plan(config, scan_prompts(config.prompts), load_model(model), model)
    assert plan.identity().get("time_grid") == (None if used == "uniform" else used)
    assert ("time_grid" in index_schema(plan).names) == (used != "uniform")
    assert {request.time_grid for request in plan.requests(list(checked_rows(config.prompts)))} == {used}
