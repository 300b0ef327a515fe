"""Image to depth with real servers: trained, exported, predicted by a batch job, evaluated, registered, served."""

import dataclasses
import hashlib
import io
import json
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from d2f_core.batch.output import OutputError, read_index
from d2f_core.data.manifest import Manifest
from d2f_core.data.schema import SchemaError, sample_id
from d2f_core.data.sources.config import ImageSource
from d2f_core.flow.depth.config import (
    DepthEvaluationError,
    DepthGateConfig,
    EvaluateDepthConfig,
    PredictDepthConfig,
    PredictDepthError,
)
from d2f_core.flow.depth.evaluation import check_evaluate_depth
from d2f_core.flow.depth.job import check_predict_depth, predict_depth
from d2f_core.flow.publish.config import RegisterConfig
from d2f_core.flow.publish.job import check_register, register
from d2f_core.model.artifact import load_model, read_description
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import local_copy, resolve_base
from d2f_core.storage import filesystem, read_bytes, write_bytes
from d2f_core.tracking import find_run
from d2f_core.train.checkpoint import CheckpointError
from pipelines import evaluate_depth, finetune
from pipelines.configs import FinetuneConfig
from pipelines.workflow_config import DepthConfig
from tests.depth_tables import picture, true_depth, write_depth_table, write_predictions
from tests.flow.here import here
from tests.latent_tables import write_latents

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]
HOME = "s3://d2f/test-depth"
IMAGES = 10


@pytest.fixture(scope="module")
def training(depth_workflow: DepthConfig) -> FinetuneConfig:
    return dataclasses.replace(depth_workflow.finetune, latents=depth_workflow.encode.output)


@pytest.fixture(scope="module")
def model(training: FinetuneConfig, depth_made: dict[str, Any]) -> str:
    return f"{training.output}/model"


@pytest.fixture(scope="module")
def config(model: str) -> PredictDepthConfig:
    """The images of a depth table and two bad ones, in a folder that is cut into three parts."""
    write_depth_table(f"{HOME}/truth", IMAGES)
    for number in range(IMAGES):
        write_bytes(f"{HOME}/folder/{number}.png", picture(number))
    write_bytes(f"{HOME}/folder/none.png", b"no image")
    write_bytes(f"{HOME}/folder/small.png", picture(0, height=8))
    return PredictDepthConfig(
        source=ImageSource(uri=f"{HOME}/folder"),
        model=model,
        output=f"{HOME}/predictions",
        steps=(1, 2),
        ensemble=2,
        batch_size=3,
        min_side=9,
        rows_per_part=4,
        num_actors=1,
        experiment="test-depth-jobs",
    )


@pytest.fixture(scope="module")
def predicted(config: PredictDepthConfig) -> Manifest:
    with here():
        return predict_depth(check_predict_depth(config))


def files_below(uri: str) -> dict[str, str]:
    """SHA-256 by name."""
    fs, path = filesystem(uri)
    return {name.removeprefix(path): hashlib.sha256(fs.cat_file(name)).hexdigest() for name in fs.find(path)}


def name_of(row: dict[str, Any]) -> str:
    return row["source_uri"].rsplit("/", 1)[-1]


def test_the_trained_model_says_what_it_is_and_its_run_shows_held_out_rows(
    training: FinetuneConfig, model: str
) -> None:
    description = read_description(local_copy(model))
    assert (description["task"], description["joined_channels"]) == ("image_to_depth", 4)
    assert load_model(model).task == "image_to_depth"
    handle = find_run(experiment=training.experiment, run_key=training.output)
    assert handle
    client = mlflow.MlflowClient()
    assert "validation_flow_loss" in client.get_run(handle.run_id).data.metrics
    picture_file = client.download_artifacts(handle.run_id, "samples.png")
    assert Image.open(picture_file).size == (3 * 16 + 8, 2 * 16 + 12)


def test_every_image_and_step_has_its_files_or_a_reason(config: PredictDepthConfig, predicted: Manifest) -> None:
    index = read_index(config.output).to_pylist()
    assert predicted.counts == {"images": IMAGES + 2, "maps": 2 * IMAGES, "failed": 4}
    reasons = {name_of(row): row["error"] for row in index if row["error"]}
    assert "undecodable" in reasons["none.png"] and "too_small: 20x8" in reasons["small.png"]
    rows = [row for row in index if not row["error"]]
    assert len({(row["sample_id"], row["steps"]) for row in rows}) == len(rows) == 2 * IMAGES
    for row in rows:
        data = read_bytes(row["depth_uri"])
        depth = np.load(io.BytesIO(data), allow_pickle=False)
        assert hashlib.sha256(data).hexdigest() == row["depth_sha256"]
        assert depth.shape == (12, 16) and depth.dtype == np.float32 and 0 <= depth.min() <= depth.max() <= 1
        levels = np.asarray(Image.open(io.BytesIO(read_bytes(row["png_uri"]))))
        np.testing.assert_allclose(levels / 65535, depth, atol=1e-5)
        spread = np.load(io.BytesIO(read_bytes(row["uncertainty_uri"])), allow_pickle=False)
        assert spread.mean() == pytest.approx(row["uncertainty"], rel=1e-4) and spread.max() > 0
        assert Image.open(io.BytesIO(read_bytes(row["preview_uri"]))).size == (32, 12)
        assert (row["width"], row["height"], row["crop"]) == (20, 16, [0, 0, 20, 16])
        assert (row["ensemble"], row["num_evaluations"], row["solver"]) == (2, row["steps"], "euler")
    with pytest.raises(OutputError, match=r"another job \(ensemble was 2, now 3\)"):
        predict_depth(check_predict_depth(dataclasses.replace(config, ensemble=3)))


def test_missing_parts_are_made_again_and_no_others(config: PredictDepthConfig, predicted: Manifest) -> None:
    fs, path = filesystem(config.output)
    fs.rm([f"{path}/manifest.json", f"{path}/index/part-000001.parquet"])
    kept = fs.info(f"{path}/index/part-000000.parquet")["LastModified"]
    with here():
        assert predict_depth(check_predict_depth(config)).digest == predicted.digest
    assert fs.info(f"{path}/index/part-000000.parquet")["LastModified"] == kept
    assert predict_depth(check_predict_depth(config)).digest == predicted.digest, "a finished job does nothing"


def test_a_depth_table_is_a_source_too(config: PredictDepthConfig) -> None:
    source = check_predict_depth(dataclasses.replace(config, source=ImageSource(uri=f"{HOME}/truth"))).source
    assert source.num_rows == IMAGES and [sample.image for sample in source.shards[0].read()][1] == picture(1)


def test_predictions_are_measured_beside_floors_and_logged(config: PredictDepthConfig, predicted: Manifest) -> None:
    write_depth_table(f"{HOME}/train", 6, first_seed=100)
    wanted = EvaluateDepthConfig(
        predictions=(config.output,),
        titles=("toy",),
        truth=f"{HOME}/truth",
        train=f"{HOME}/train",
        output=f"{HOME}/evaluation",
        replicates=20,
        shown=2,
        rows_per_part=4,
        experiment="test-depth-evaluations",
    )
    results = evaluate_depth.main(wanted)
    with here():
        alone = evaluate_depth.main(dataclasses.replace(wanted, output=f"{HOME}/evaluated-here", experiment=""))
    by_two, by_one = (files_below(f"{HOME}/{name}/measured") for name in ("evaluation", "evaluated-here"))
    assert by_two == by_one and len([name for name in by_two if name.endswith(".parquet")]) == 3
    assert {**alone, "errors": ""} == {**results, "errors": ""}
    values = results["metrics"]["abs_rel"]["values"]
    assert set(values) == {"toy", "constant", "vertical ramp", "mean depth"} and set(values["toy"]) == {"1", "2"}
    assert values["vertical ramp"]["0"]["value"] < values["constant"]["0"]["value"]
    assert results["images"] == IMAGES and results["left_out"] == 0 and results["aspect"] == "whole images"
    assert json.loads(read_bytes(f"{wanted.output}/depth_metrics.json")) == results
    for name in ("depth.png", "depth_sheet.png"):
        assert read_bytes(f"{wanted.output}/{name}").startswith(b"\x89PNG")
    handle = find_run(experiment=wanted.experiment, run_key=wanted.output)
    assert handle
    logged = mlflow.MlflowClient().get_metric_history(handle.run_id, "toy/abs_rel")
    assert {point.step: point.value for point in logged} == {
        int(count): pytest.approx(one["value"]) for count, one in values["toy"].items()
    }
    with pytest.raises(DepthEvaluationError, match="is a table of generations, not of depth"):
        check_evaluate_depth(dataclasses.replace(wanted, truth=config.output))
    nobody = np.full((16, 16), np.nan, np.float32)
    write_depth_table(f"{HOME}/hidden", 1, depth=nobody)
    with pytest.raises(DepthEvaluationError, match=r"of 's3://\S+/hidden': it has 0 pixels with a depth"):
        evaluate_depth.main(dataclasses.replace(wanted, truth=f"{HOME}/hidden", num_actors=1))
    with pytest.raises(DepthEvaluationError, match=r"titles=.* one for each"):
        dataclasses.replace(wanted, titles=("a", "b"))


def test_another_training_at_its_output_is_refused_before_anything_is_written(
    training: FinetuneConfig, depth_made: dict[str, Any]
) -> None:
    before = read_bytes(f"{training.output}/config.yaml")
    other = dataclasses.replace(training, train=dataclasses.replace(training.train, seed=5))
    for function in (finetune.check, finetune.main):
        with pytest.raises(CheckpointError, match="Choose another --output"):
            function(other)
    assert read_bytes(f"{training.output}/config.yaml") == before


def test_mlflow_opens_a_registered_version_and_sees_the_depth_that_the_job_sees(
    training: FinetuneConfig, config: PredictDepthConfig, predicted: Manifest
) -> None:
    wanted = RegisterConfig(run=training.output, name="test-depth", experiment=training.experiment)
    version = register(check_register(wanted))
    assert version.tags["task"] == "image_to_depth"
    info = mlflow.models.get_model_info(version.uri)
    assert info.signature.inputs.required_input_names() == ["image"]
    assert info.signature.outputs.input_names() == ["depth", "depth_png", "uncertainty"]
    opened = mlflow.pyfunc.load_model("models:/test-depth@candidate")
    asked = pd.DataFrame({"image": [picture(0), picture(1)], "num_inference_steps": [2, 1], "ensemble": [2, 2]})
    found = opened.predict(asked)
    rows = {(name_of(row), row["steps"]): row for row in read_index(config.output).to_pylist()}
    for number, steps in ((0, 2), (1, 1)):
        own = np.load(io.BytesIO(read_bytes(rows[f"{number}.png", steps]["depth_uri"])))
        np.testing.assert_allclose(np.load(io.BytesIO(found["depth"][number])), own, atol=1e-3)
        assert found["depth_png"][number].startswith(b"\x89PNG")
    with pytest.raises(Exception, match="Give the bytes of a PNG"):
        opened.predict(pd.DataFrame({"image": [b"no image"]}))
    description = mlflow.MlflowClient().get_model_version("test-depth", version.version).description
    assert "pipelines.predict_depth" in description


def test_a_registered_version_that_beats_the_floors_becomes_the_champion(
    training: FinetuneConfig, config: PredictDepthConfig
) -> None:
    """Its maps are made up: no model that is trained for two steps knows more than the mean."""
    del config  # has written the truth
    wanted = RegisterConfig(run=training.output, name="judged-depth", experiment=training.experiment)
    version = register(check_register(wanted))
    generator = np.random.default_rng(0)
    maps = {}
    for number in range(IMAGES):
        truth = np.nan_to_num(true_depth(number), nan=5.0)
        maps[sample_id(picture(number), "")] = {4: truth + 0.05 * generator.normal(size=truth.shape)}
    judged = EvaluateDepthConfig(
        predictions=(write_predictions(f"{HOME}/judged", maps, model_uri=version.uri, crop="whole"),),
        truth=f"{HOME}/truth", output=f"{HOME}/judgement", experiment="", replicates=40,
        gate=DepthGateConfig(candidate=version.uri, least_images=IMAGES),
    )  # fmt: skip
    with here():
        found = evaluate_depth.main(judged)["gate"]
        again = evaluate_depth.main(dataclasses.replace(judged, output=f"{HOME}/judgement-again"))["gate"]
    assert found["promotion"] == "judged-depth@champion moved to version 1 (before: no version)"
    assert found["champion"] == ""
    assert mlflow.MlflowClient().get_model_version_by_alias("judged-depth", "champion").version == version.version
    assert again["verdict"]["reason"] == "the candidate is the champion already" and not again["verdict"]["passed"]


def test_tables_and_models_of_another_task_are_refused(training: FinetuneConfig, depth_made: dict[str, Any]) -> None:
    plain = f"{HOME}/plain"
    write_latents(
        plain, autoencoder_fingerprint(resolve_base(training.model.base)), rows=8, rows_per_file=8, captions=2
    )
    with pytest.raises(SchemaError, match="made for task='text_to_image', the model is to learn task='image_to_depth'"):
        finetune.check(dataclasses.replace(training, latents=plain))
    text = dataclasses.replace(training, model=dataclasses.replace(training.model, task="text_to_image"))
    with pytest.raises(SchemaError, match=r"made for task='image_to_depth'.* Give --model.task image_to_depth"):
        finetune.check(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 17}, "resolution=17: height=17 must be a multiple of the autoencoder's 2 pixels"),
        ({"solver": "eulr"}, "solver='eulr' is not known"),
        ({"solver": "dopri5"}, r"chooses its steps by itself: steps=\(1, 2\)"),
        ({"model": ""}, "model is empty"),
        ({"output": f"{HOME}/folder/inside"}, "lies inside the source"),
        ({"source": ImageSource(uri=f"{HOME}/nothing")}, "holds no"),
    ],
)
def test_what_cannot_work_is_refused_before_the_cluster_is_used(
    config: PredictDepthConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_predict_depth(dataclasses.replace(config, **change))


def test_a_text_to_image_model_is_refused(config: PredictDepthConfig, base: str) -> None:
    with pytest.raises(PredictDepthError, match="is a model of task='text_to_image': it reads no image"):
        check_predict_depth(dataclasses.replace(config, model=base))
