"""Registered models against real servers: MLflow's own tools open them, aliases come back, strange files stay out."""

import dataclasses
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks.fault_proxy import FaultProxy
from d2f_core import retry, storage
from d2f_core.flow.generate.sampler import ImageSampler, fill_request
from d2f_core.flow.publish.config import PromoteConfig, RegisterConfig
from d2f_core.flow.publish.job import check_move_alias, check_register, move_alias, register
from d2f_core.hashing import hash_directory
from d2f_core.model.artifact import load_model
from d2f_core.model.config import LoraConfig
from d2f_core.model.description import write_description
from d2f_core.registration import RegisterError
from d2f_core.tracking import (
    HeldAlias,
    ModelVersionInfo,
    NewVersion,
    RunHandle,
    TrackingError,
    check_leases,
    get_alias,
    holding,
    log_checkpoint_model,
    model_version,
    promote,
    register_model,
    resolve_model,
    rollback,
    server,
    start_run,
)
from d2f_core.tracking.lease_places import leases_beside
from d2f_core.tracking.model_files import download_model
from d2f_core.tracking.server import UnreachableTrackingError, client_for
from infra.local.stack import StackEnv
from pipelines import contact_sheet
from pipelines import promote as promote_job
from pipelines import register as register_job
from pipelines.cli import run_job
from pipelines.promote import RECIPES
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
    assert "diff2flow" not in requirements and "diffusers==" in requirements and "+cpu" not in requirements


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


def test_promotions_come_back_one_by_one(stack: StackEnv, tmp_path: Path) -> None:
    handle, name = start("s3://d2f/runs/promote"), "promoted"
    assert get_alias(name, "champion") is None
    for number in (1, 2, 3):
        tiny(handle, tmp_path / str(number), name, bytes([number]))
    with pytest.raises(TrackingError, match="There is no promoted@champion"):
        rollback(name)
    for number in ("1", "2", "2", "3", "1"):
        assert move_alias(PromoteConfig(name=name, version=number)).version == number
    back = dataclasses.replace(RECIPES["emoji-flow"], name=name, rollback=True)
    assert [move_alias(back).version for _ in range(3)] == ["3", "2", "1"]
    with pytest.raises(TrackingError, match="no earlier one to return to"):
        move_alias(back)
    assert get_alias(name, "champion") == "1" and get_alias(name, "candidate") == "3"
    client = client_for(handle.tracking_uri)
    promote(name, "2")
    promote(name, "3")
    client.delete_model_version(name, "2")
    assert rollback(name).version == "1", "a version that is gone is passed over"
    with pytest.raises(RegisterError, match="Give --version N, or --rollback"):
        move_alias(PromoteConfig(name=name))


class Killed(BaseException):
    """In place of SIGKILL, which `benchmarks.promotions` sends."""


def kill_at(monkeypatch: pytest.MonkeyPatch, request: int, *, arrives: bool) -> None:
    """End the process at its n-th request that changes the registry, before or after it is carried out."""
    sent, write = [0], HeldAlias._write

    def deadly(self: HeldAlias, what: str, call: Callable[[], Any]) -> Any:
        sent[0] += 1
        if sent[0] < request:
            return write(self, what, call)
        if arrives:
            write(self, what, call)
        raise Killed

    monkeypatch.setattr(HeldAlias, "_write", deadly)


@pytest.fixture(scope="module")
def moved_by_hand(stack: StackEnv, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], None]:
    """Sets alias, history and mark of four versions of `killed`, as if others had done so."""
    handle, directory = start("s3://d2f/runs/killed"), tmp_path_factory.mktemp("killed")
    for number in (1, 2, 3, 4):
        tiny(handle, directory / str(number), "killed", bytes([number]))
    client = client_for(handle.tracking_uri)

    def move(current: str, previous: str, rolled_back: str = "") -> None:
        client.set_registered_model_alias("killed", "champion", current)
        client.set_registered_model_tag("killed", "d2f.previous.champion", previous)
        for version in "1234":
            client.delete_model_version_tag("killed", version, "d2f.rolled_back.champion")
        if rolled_back:
            client.set_model_version_tag("killed", rolled_back, "d2f.rolled_back.champion", "1")

    return move


def history() -> tuple[str | None, list[str], set[str]]:
    """Of `killed`: the champion, those before it, and those that were rolled back from."""
    client = client_for(mlflow.get_tracking_uri())
    model = client.get_registered_model("killed")
    versions = client.search_model_versions("name = 'killed'")
    marked = {str(version.version) for version in versions if version.tags.get("d2f.rolled_back.champion")}
    return get_alias("killed", "champion"), model.tags["d2f.previous.champion"].split(), marked


@pytest.mark.parametrize("arrives", [False, True])
def test_a_promotion_killed_at_any_request_and_repeated_is_one_promotion(
    moved_by_hand: Callable[..., None], monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    for request in (1, 2, 3):
        moved_by_hand("2", "1", rolled_back="3")
        with monkeypatch.context() as patch:
            kill_at(patch, request, arrives=arrives)
            with pytest.raises(Killed):
                promote("killed", "3")
        assert promote("killed", "3").version == "3"
        assert history() == ("3", ["1", "2"], set()), "a person has promoted it again"
        assert rollback("killed").version == "2"


@pytest.mark.parametrize("arrives", [False, True])
def test_a_rollback_goes_to_the_version_before_the_one_that_is_whatever_was_killed(
    moved_by_hand: Callable[..., None], monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    for request in (1, 2, 3):
        moved_by_hand("4", "1 2 3")
        with monkeypatch.context() as patch:
            kill_at(patch, request, arrives=arrives)
            with pytest.raises(Killed):
                rollback("killed")
        now, _, marked = history()
        assert now == ("3" if request + arrives > 2 else "4") and marked == ({"4"} if request + arrives > 1 else set())
        assert rollback("killed").version == str(int(now) - 1)
        assert history()[:2] == (str(int(now) - 1), ["1", "2"][: int(now) - 2]) and "4" in history()[2]


def test_a_killed_promotion_of_one_version_does_not_confuse_that_of_another(
    moved_by_hand: Callable[..., None],
) -> None:
    moved_by_hand("2", "1 2")  # killed while it promoted something
    promote("killed", "4")
    assert history()[:2] == ("4", ["1", "2"])
    moved_by_hand("2", "1 2 2 2")
    assert rollback("killed").version == "1" and history() == ("1", [], {"2"})


def test_leases_of_a_model_are_where_its_first_training_says_or_where_they_are_given(
    stack: StackEnv, tmp_path: Path
) -> None:
    handle = start("s3://d2f/tests/leases/runs/first")
    tiny(handle, tmp_path / "1", "leased", b"1")
    tiny(start("s3://d2f/other/runs/second"), tmp_path / "2", "leased", b"2")
    client = client_for(handle.tracking_uri)

    def place() -> str | None:
        return client.get_registered_model("leased").tags.get("d2f.leases")

    assert place() == "s3://d2f/tests/leases/leases"
    promote("leased", "1")
    assert json.loads(storage.read_bytes(f"{place()}/leased.json"))["free"] is True
    client.delete_registered_model_tag("leased", "d2f.leases")  # a model that an older program has made
    promote("leased", "2")
    assert place() == "s3://d2f/tests/leases/leases", "of the first version's training, whichever is promoted"
    move_alias(PromoteConfig(name="leased", rollback=True, leases=str(tmp_path / "leases")))
    assert place() == str(tmp_path / "leases") and (tmp_path / "leases/leased.json").is_file()
    with pytest.raises(storage.StorageError, match="no bucket 'none'"):
        check_move_alias(PromoteConfig(name="leased", version="1", leases="s3://none/leases"))

    client.create_registered_model("strange")
    with pytest.raises(TrackingError, match=r"Nothing tells where .* versions of strange .* Give --leases DIRECTORY"):
        check_leases("strange")
    check_leases("strange", output="s3://d2f/evaluations/x")
    with holding("strange", "champion", "x", output="s3://d2f/tests/leases/evaluations/x"):
        tags = client.get_registered_model("strange").tags
    assert tags["d2f.leases"] == "s3://d2f/tests/leases/leases"


@pytest.mark.parametrize(
    ("output", "place"),
    [
        ("s3://b/runs/x", "s3://b/leases"), ("s3://b/team/runs/x/", "s3://b/team/leases"), ("s3://b/x", "s3://b/leases"),
        ("s3://b", "s3://b/leases"), ("/data/runs/x", "/data/leases"), ("file:///data/runs/x", "/data/leases"),
        ("/runs/x", "/runs/leases"), ("/x", "/x/leases"),
    ],
)  # fmt: skip
def test_leases_lie_beside_the_directory_of_outputs(output: str, place: str) -> None:
    assert leases_beside(output) == place


@pytest.fixture
def bad_registry(stack: StackEnv, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """MLflow behind a bad network."""
    monkeypatch.setattr(server, "RETRY_SECONDS", 10.0)
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.05)
    with FaultProxy.before(stack.variables["MLFLOW_TRACKING_URI"], seed=3) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        yield proxy


def test_a_registry_that_is_away_and_loses_answers_is_waited_for_and_read_back(
    moved_by_hand: Callable[..., None], bad_registry: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved_by_hand("2", "1")
    bad_registry.reset_rate = 0.3
    assert promote("killed", "3").version == "3" and rollback("killed").version == "2"
    promote("killed", "4")
    bad_registry.reset_rate = 0.0
    assert bad_registry.counts["reset"] >= 5 and history() == ("4", ["1", "2"], {"3"})
    bad_registry.outage_for(2.0)
    assert rollback("killed").version == "2"
    monkeypatch.setattr(server, "RETRY_SECONDS", 0.5)
    bad_registry.outage = True
    with pytest.raises(UnreachableTrackingError, match="the same command goes on from there"):
        promote("killed", "3")


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
