"""Registered models against real servers: MLflow's own tools open them, aliases come back, strange files stay out."""

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from d2f_core import storage
from d2f_core.flow.generate.sampler import ImageSampler, fill_request
from d2f_core.flow.publish.config import RegisterConfig
from d2f_core.flow.publish.job import check_register, register
from d2f_core.hashing import hash_directory
from d2f_core.model.artifact import load_model
from d2f_core.model.config import LoraConfig
from d2f_core.model.description import write_description
from d2f_core.tracking import (
    ModelVersionInfo,
    NewVersion,
    RunHandle,
    TrackingError,
    get_alias,
    log_checkpoint_model,
    model_version,
    promote,
    register_model,
    resolve_model,
    start_run,
)
from d2f_core.tracking.model_files import download_model
from d2f_core.tracking.server import client_for
from infra.local.stack import StackEnv
from pipelines import contact_sheet
from pipelines import promote as promote_job
from pipelines import register as register_job
from pipelines.cli import run_job
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import trained

EXPERIMENT = "registry tests"
RUN, CHECKPOINT = "s3://d2f/tests/registry", "s3://d2f/tests/registry/checkpoints/step-00000004.a"
CONFIG = RegisterConfig(run=RUN, name="registry-tests", experiment=EXPERIMENT)
LOSS = "validation_flow_loss"


def start(key: str) -> RunHandle:
    tags = {"d2f.latents_digest": "abc123"}
    return start_run(
        experiment=EXPERIMENT, run_key=key, name="run", config_yaml="train:\n  lr: 0.1\n", params={}, tags=tags
    )


@pytest.fixture(scope="module")
def run(stack: StackEnv, tmp_path_factory: pytest.TempPathFactory) -> RunHandle:
    """A training's output: model, checkpoint with its evaluation, and an MLflow run that has the metrics too."""
    del stack
    directory = tmp_path_factory.mktemp("registry")
    base = write_tiny_base(directory / "base")
    model = Path(trained(base, directory / "model", LoraConfig(rank=2), steps=2, guidance=1.5))
    description = json.loads((model / "diff2flow.json").read_text())
    training = {"latents": "s3://d2f/latents", "step": 4, "checkpoint": CHECKPOINT, "identity": "1f"}
    write_description(model, {**description, "training": training})
    storage.upload_tree(model, f"{RUN}/model")
    storage.write_bytes(f"{CHECKPOINT}/evaluation.json", json.dumps({"metrics": {LOSS: 0.25}}).encode())
    handle = start(RUN)
    handle.log_metrics(4, {LOSS: 0.25})
    handle.log_image("samples", Image.new("RGB", (8, 8), "red"), 4)
    return handle


@pytest.fixture(scope="module")
def version(run: RunHandle) -> ModelVersionInfo:
    del run
    return register(check_register(CONFIG))


def listed(model_id: str, place: str = "") -> set[str]:
    client = client_for(mlflow.get_tracking_uri())
    names = set()
    for info in client.list_logged_model_artifacts(model_id, place or None):
        names |= listed(model_id, info.path) if info.is_dir else {info.path}
    return names


def model_id(version: ModelVersionInfo) -> str:
    found = client_for(mlflow.get_tracking_uri()).get_model_version(version.name, version.version)
    return found.source.removeprefix("models:/")


def test_mlflow_opens_a_version_and_draws_the_images_that_this_project_draws(
    run: RunHandle, version: ModelVersionInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    opened = mlflow.pyfunc.load_model(f"models:/{CONFIG.name}@candidate")
    rows = pd.DataFrame(
        {
            "prompt": ["red apple", "cat face"], "seed": [3, 4], "num_inference_steps": [3, 1],
            "solver": ["heun", None], "guidance_scale": [2.0, 1.0], "negative_prompt": ["", "dog"],
            "height": [16, 32], "width": [16, 16], "shift": [2.0, 1.0],
        }
    )  # fmt: skip
    sampler = ImageSampler(load_model(resolve_model(version.uri)))
    apple = {"seed": 3, "steps": 3, "solver": "heun", "guidance": 2.0, "height": 16, "width": 16, "shift": 2.0}
    cat = {"seed": 4, "steps": 1, "negative_prompt": "dog", "guidance": 1.0, "height": 32, "width": 16, "shift": 1.0}
    requests = {"red apple": apple, "cat face": cat, "rocket": {}}
    wanted = [
        sampler.sample([fill_request(sampler.model, prompt=name, **given)])[0] for name, given in requests.items()
    ]
    [plain] = opened.predict(pd.DataFrame({"prompt": ["rocket"]}))
    for png, image in zip([*opened.predict(rows), plain], wanted, strict=True):
        assert png.startswith(b"\x89PNG")
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), image.pixels)
    assert opened.predict({"prompt": ["rocket"]}, params={"seed": 0, "num_inference_steps": 2}) == [plain]
    assert len({plain, *opened.predict({"prompt": ["rocket", "sun"]}, params={"seed": 5})}) == 3
    with pytest.raises(Exception, match="solver='evil' is not known"):
        opened.predict(pd.DataFrame({"prompt": ["rocket"], "solver": ["evil"]}))


def test_signature_and_example_are_there_and_no_pickle_is(version: ModelVersionInfo) -> None:
    info = mlflow.models.get_model_info(version.uri)
    assert info.signature.inputs.required_input_names() == ["prompt"]
    names = {"negative_prompt", "num_inference_steps", "guidance_scale", "height", "width", "seed", "solver", "shift"}
    assert set(info.signature.inputs.optional_input_names()) == names == {spec.name for spec in info.signature.params}
    assert info.signature.outputs.input_names() == ["image"]
    names = listed(model_id(version))
    own = {"README.md", "config.yaml", "samples.png", "diff2flow.json"}
    own |= {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    others = {"MLmodel", "conda.yaml", "input_example.json", "image_pyfunc.py", "python_env.yaml", "requirements.txt"}
    assert names == {f"artifacts/model/{name}" for name in own} | others | {"serving_input_example.json"}
    requirements = Path(mlflow.artifacts.download_artifacts(f"{version.uri}/requirements.txt")).read_text()
    wanted = [line for line in requirements.splitlines() if not line.startswith("#")]
    assert not [line for line in wanted if "diff2flow" in line or "+cpu" in line], "pip can fetch all of them"
    assert "diffusers==" in requirements and "# And diff2flow-ray==" in requirements


def test_a_version_carries_all_that_it_was_made_of(run: RunHandle, version: ModelVersionInfo) -> None:
    client = client_for(run.tracking_uri)
    found = client.get_model_version(version.name, version.version)
    assert version.run_id == run.run_id and model_version(version.uri).tags == version.tags
    wanted = {
        "data_digest": "abc123",
        f"metric.{LOSS}": "0.25",
        "training.step": "4",
    }
    assert wanted.items() <= version.tags.items() and len(version.tags) <= 15, "MLflow lists every one in each row"
    assert len(found.description) <= 5000 and run.url in found.description
    local = Path(resolve_model(version.uri))
    card = (local / "README.md").read_text()
    for fact in ("abc123", CHECKPOINT, "lr: 0.1", f"| {LOSS} | 0.25 |", "![samples", "| method | lora |"):
        assert fact in card
    assert (local / "config.yaml").read_text() == "train:\n  lr: 0.1\n"
    assert Image.open(local / "samples.png").size == (8, 8)
    logged = client.get_logged_model(model_id(version))
    assert [(metric.key, metric.value, metric.step) for metric in logged.metrics or []] == [(LOSS, 0.25, 4)]
    assert [output.model_id for output in client.get_run(run.run_id).outputs.model_outputs] == [model_id(version)]


def test_registering_again_changes_nothing(run: RunHandle, version: ModelVersionInfo) -> None:
    assert register(check_register(CONFIG)) == version
    client = client_for(run.tracking_uri)
    assert len(list(client.search_model_versions(f"name = '{CONFIG.name}'"))) == 1
    assert len(client.search_logged_models([run.experiment_id], "tags.`objective` = 'diff2flow'")) == 1
    assert len(client.get_metric_history(run.run_id, LOSS)) == 1, "the model's metric is no second point of the run"


def tiny(handle: RunHandle, directory: Path, name: str, content: bytes) -> ModelVersionInfo:
    directory.mkdir()
    (directory / "a.safetensors").write_bytes(content)
    return register_model(
        handle, NewVersion(model_dir=directory, name=name, model_type="diff2flow", tags={}, description="")
    )


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        (promote_job, ("emoji-flow", "--name", "dry", "--version", "99"), "dry/99"),
        (promote_job, ("emoji-flow", "--name", "dry", "--rollback"), "there is no earlier one"),
        (register_job, ("emoji-flow", "--run", "s3://d2f/runs/never-run"), "MLflow has no run of"),
        (contact_sheet, ("compare", "--generations", "s3://d2f/none"), "has no manifest.json"),
    ],
)
def test_a_dry_run_looks_for_what_the_job_needs(
    job, arguments, message, stack: StackEnv, tmp_path, monkeypatch, capsys
):
    handle = start("s3://d2f/runs/dry")
    tiny(handle, tmp_path / "1", "dry", b"1")
    promote("dry", "1")
    monkeypatch.setattr("sys.argv", ["job", *arguments, "--dry-run"])
    recipes = next(value for value in vars(job).values() if isinstance(value, dict) and arguments[0] in value)
    with pytest.raises(SystemExit) as ended:
        run_job("job", recipes, job.main, job.check)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and message in printed.err and "nothing was done" not in printed.out
    assert get_alias("dry", "champion") == "1"


def test_a_version_that_is_not_all_uploaded_is_not_promoted(stack: StackEnv) -> None:
    handle, name = start("s3://d2f/runs/partial"), "partial"
    client = client_for(handle.tracking_uri)
    begun = client.create_logged_model(handle.experiment_id, name=name, source_run_id=handle.run_id)
    client.create_registered_model(name)
    client.create_model_version(name, source=f"models:/{begun.model_id}", model_id=begun.model_id)
    with pytest.raises(TrackingError, match="models:/partial/1 is PENDING, but must be READY"):
        promote(name, "1")
    assert get_alias(name, "champion") is None
    with pytest.raises(TrackingError, match="this project did not register it"):
        resolve_model("models:/partial/1")


def test_mlflow_ranks_the_checkpoints_by_their_metrics(stack: StackEnv) -> None:
    handle = start("s3://d2f/runs/checkpoints")
    losses = {2: 0.5, 4: 0.125, 6: 0.25}
    for step, loss in losses.items():
        handle.log_metrics(step, {LOSS: loss})

    def log(step: int) -> str:
        uri = f"s3://d2f/runs/checkpoints/step-{step}"
        params = {"lr": 0.1, "method": "lora"}
        return log_checkpoint_model(
            handle, name=f"step-{step}", step=step, uri=uri, metrics={LOSS: losses[step]}, params=params
        )

    ids = {step: log(step) for step in losses}
    assert {step: log(step) for step in losses} == ids
    client = client_for(handle.tracking_uri)
    order = [{"field_name": f"metrics.{LOSS}", "ascending": True}]
    ranked = client.search_logged_models([handle.experiment_id], "tags.`step` != '0'", order_by=order)
    assert [model.model_id for model in ranked if model.source_run_id == handle.run_id] == [ids[4], ids[6], ids[2]]
    best = client.get_logged_model(ids[4])
    assert best.status == "READY" and best.params == {"lr": "0.1", "method": "lora"}
    assert listed(ids[4]) == {"checkpoint.json"}
    assert [(point.step, point.value) for point in client.get_metric_history(handle.run_id, LOSS)] == [*losses.items()]
    assert len(client.get_run(handle.run_id).outputs.model_outputs) == 3


def test_a_model_in_a_bucket_without_proxy_is_registered_and_resolved(stack: StackEnv, tmp_path: Path) -> None:
    client = client_for(stack.variables["MLFLOW_TRACKING_URI"])
    experiment = client.create_experiment("registry tests on S3", artifact_location="s3://d2f/tests/registry-direct")
    found = client.create_run(experiment)
    handle = RunHandle(tracking_uri=client.tracking_uri, experiment_id=experiment, run_id=found.info.run_id)
    info = tiny(handle, tmp_path / "model", "direct", b"1")
    assert hash_directory(Path(resolve_model(info.uri, cache_dir=tmp_path / "cache"))) == info.content_hash


class Listing(BaseHTTPRequestHandler):
    """An artifact server that lists what it is told to."""

    files: list[dict[str, Any]]

    def do_GET(self) -> None:
        content = json.dumps({"files": self.files}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@pytest.fixture(scope="module")
def listing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Listing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api/2.0/mlflow-artifacts/artifacts/model"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "names",
    [
        ["../../climbed"], ["/climbed"], ["artifacts/../../climbed"], ["artifacts/model/../../../climbed"],
        ["..\\climbed"], ["%2e%2e/climbed"], ["artifacts//model/a.json"], ["artifacts/model/a.json"], ["evil.bin"],
        ["MLmodel"], ["MLmodel", "python_model.pkl"], [f"a{number}.py" for number in range(2000)], ["loop/"],
    ],
    ids=lambda names: names[-1],
)  # fmt: skip
def test_a_listing_that_climbs_out_or_holds_strange_files_is_refused(
    stack: StackEnv, listing: str, tmp_path: Path, names: list[str]
) -> None:
    Listing.files = [{"path": name.rstrip("/"), "is_dir": name.endswith("/"), "file_size": 1} for name in names]
    target = tmp_path / "cache" / "model"
    target.parent.mkdir()
    with pytest.raises((TrackingError, mlflow.MlflowException)) as caught:
        download_model(listing, target, "a" * 64)
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*climbed*")) and not list(target.parent.iterdir())
