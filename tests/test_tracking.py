"""Runs, metrics and registered models against a real MLflow server."""

import contextlib
import dataclasses
import json
import pickle
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.entities import Metric
from PIL import Image

from benchmarks.fault_proxy import FaultProxy
from d2f_core.hashing import hash_directory
from d2f_core.tracking import (
    MetricLog,
    NewVersion,
    RunHandle,
    TrackingError,
    check_tracking,
    ending,
    find_run,
    pin_model,
    register_model,
    resolve_model,
    run_metrics,
    server,
    start_run,
)
from d2f_core.tracking.runs import END_TAG
from d2f_core.tracking.server import attempt, client_for
from infra.local.stack import StackEnv

EXPERIMENT = "tracking tests"
TAGS = {"base_uri": "s3://d2f/base", "base_sha256": "ab", "prediction_type": "epsilon", "solver": "euler", "steps": "4"}


def start(key: str, **params: object) -> RunHandle:
    return start_run(experiment=EXPERIMENT, run_key=key, name=key, config_yaml="a: 1\n", params=params, tags={"k": "v"})


def model_directory(path: Path, weights: bytes) -> Path:
    (path / "unet").mkdir(parents=True)
    (path / "diff2flow.json").write_text("{}")
    (path / "unet/model.safetensors").write_bytes(weights)
    return path


@pytest.fixture
def registered(stack: StackEnv, request: pytest.FixtureRequest) -> tuple[RunHandle, str]:
    """A run, and the name of a model of this test's own."""
    del stack
    return start(f"s3://d2f/runs/{request.node.name}"), f"model-{request.node.name[:40]}"


def test_a_resumed_training_continues_its_run(stack: StackEnv, caplog: pytest.LogCaptureFixture) -> None:
    first = start("s3://d2f/runs/resumed", train={"lr": 1e-4, "seed": 0})
    first.finish("FAILED")
    again = start("s3://d2f/runs/resumed/", train={"lr": 3e-4, "seed": 0}, more=1)
    assert again == first and "param train.lr is now 0.0003" in caplog.text
    assert start("s3://d2f/runs/another") != first
    assert find_run(experiment=EXPERIMENT, run_key="s3://d2f/runs/resumed") == first
    assert find_run(experiment=EXPERIMENT, run_key="s3://d2f/runs/none") is None
    assert find_run(experiment="no such experiment", run_key="s3://d2f/runs/resumed") is None
    run = client_for(first.tracking_uri).get_run(first.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"train.lr": "0.0001", "train.seed": "0", "more": "1"}
    assert {"k": "v", "d2f.run_key": "s3://d2f/runs/resumed"}.items() <= run.data.tags.items()


def test_a_run_that_ended_early_says_why_until_it_is_resumed(stack: StackEnv) -> None:
    handle = start("s3://d2f/runs/ended")
    client = client_for(handle.tracking_uri)
    with pytest.raises(ValueError, match="collapsed"), ending(handle):
        raise ValueError("step 40: the model has collapsed")
    ended = client.get_run(handle.run_id)
    assert (ended.info.status, ended.data.tags[END_TAG]) == ("FAILED", "step 40: the model has collapsed")
    assert start("s3://d2f/runs/ended") == handle
    again = client.get_run(handle.run_id)
    assert again.info.status == "RUNNING" and END_TAG not in again.data.tags
    with pytest.raises(SystemExit), ending(handle):
        raise SystemExit(143)
    killed = client.get_run(handle.run_id)
    assert (killed.info.status, killed.data.tags[END_TAG]) == ("KILLED", "SIGTERM")


def test_everything_logged_is_there(stack: StackEnv, tmp_path: Path) -> None:
    handle = pickle.loads(pickle.dumps(start("s3://d2f/runs/logged")))
    for step in range(30):
        handle.log_metrics(step, {f"m{number}": step + number for number in range(20)})
    handle.log_image("samples", Image.new("RGB", (8, 8), "red"), 7)
    (tmp_path / "card.md").write_text("# card")
    handle.log_file(tmp_path / "card.md", "cards")
    client = client_for(handle.tracking_uri)
    for number in range(20):
        history = client.get_metric_history(handle.run_id, f"m{number}")
        assert [(entry.step, entry.value) for entry in history] == [(step, step + number) for step in range(30)]
    paths = [file.path for folder in ("", "images", "cards") for file in client.list_artifacts(handle.run_id, folder)]
    assert {"config.yaml", "cards/card.md", "samples.png"} <= set(paths)
    assert sum("samples+step+7" in path for path in paths) == 2, "the picture and its thumbnail"


def test_registering_twice_gives_one_version(registered: tuple[RunHandle, str], tmp_path: Path) -> None:
    handle, name = registered
    first = register_model(
        handle,
        NewVersion(
            model_dir=model_directory(tmp_path / "a", b"1"),
            name=name,
            model_type="diff2flow",
            tags=TAGS,
            description="# A model",
        ),
    )
    again = register_model(
        handle,
        NewVersion(model_dir=tmp_path / "a", name=name, model_type="diff2flow", tags=TAGS, description="# A model"),
    )
    other = register_model(
        handle,
        NewVersion(
            model_dir=model_directory(tmp_path / "b", b"2"),
            name=name,
            model_type="diff2flow",
            tags=TAGS,
            description="# Another",
        ),
    )
    assert first == again and (first.version, other.version) == ("1", "2")
    client = client_for(handle.tracking_uri)
    version = client.get_model_version(name, "1")
    assert version.description == "# A model" and version.run_id == handle.run_id
    assert TAGS.items() <= version.tags.items() and version.tags["d2f.content_hash"] == hash_directory(tmp_path / "a")
    assert client.get_model_version_by_alias(name, "candidate").version == "2"


def test_a_registration_that_was_killed_is_continued(registered: tuple[RunHandle, str], tmp_path: Path) -> None:
    handle, name = registered
    directory = model_directory(tmp_path / "a", b"1")
    client = client_for(handle.tracking_uri)
    tags = {"d2f.content_hash": hash_directory(directory)}
    begun = client.create_logged_model(handle.experiment_id, name=name, source_run_id=handle.run_id, tags=tags)
    info = register_model(
        handle, NewVersion(model_dir=directory, name=name, model_type="diff2flow", tags=TAGS, description="")
    )
    assert client.get_model_version(name, info.version).source == f"models:/{begun.model_id}"
    assert len(list(client.search_model_versions(f"name = '{name}'"))) == 1
    assert (Path(resolve_model(info.uri, cache_dir=tmp_path)) / "unet/model.safetensors").read_bytes() == b"1"


def test_a_model_uri_gives_the_files_that_were_registered(registered: tuple[RunHandle, str], tmp_path: Path) -> None:
    handle, name = registered
    for number in (1, 2):
        directory = model_directory(tmp_path / str(number), bytes([number]))
        register_model(
            handle, NewVersion(model_dir=directory, name=name, model_type="diff2flow", tags=TAGS, description="")
        )
        if number == 1:
            pinned = pin_model(f"models:/{name}@candidate")
    assert pinned == f"models:/{name}/1" and pin_model(f"models:/{name}@candidate") == f"models:/{name}/2"
    local = Path(resolve_model(pinned, cache_dir=tmp_path / "cache"))
    assert hash_directory(local) == hash_directory(tmp_path / "1") == local.name
    assert resolve_model(pinned, cache_dir=tmp_path / "cache") == str(local)
    for uri in ("s3://d2f/models/a", "/models/a"):
        assert pin_model(uri) == resolve_model(uri) == uri


@pytest.mark.parametrize("uri", ["models:/none@candidate", "models:/none/1", "models:/a/b", "models:/a"])
def test_an_unknown_model_is_one_line(stack: StackEnv, uri: str) -> None:
    with pytest.raises(TrackingError) as caught:
        resolve_model(uri)
    assert "\n" not in str(caught.value) and uri in str(caught.value)


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize("place", ["unset", "closed", "silent", "no such host"])
def test_an_unusable_server_is_refused_within_10_seconds(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as server:
        port = server.getsockname()[1]
        uris = {"unset": "", "closed": "http://127.0.0.1:1", "silent": f"http://127.0.0.1:{port}"}
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uris.get(place, "http://no-such-host.invalid"))
        started = time.monotonic()
        with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI") as caught:
            check_tracking()
        assert time.monotonic() - started < 10 and "\n" not in str(caught.value)


@pytest.fixture
def proxy(stack: StackEnv) -> Iterator[FaultProxy]:
    """In front of the MLflow server; reached by the handles that `through` makes."""
    with FaultProxy.before(stack.variables["MLFLOW_TRACKING_URI"]) as running:
        yield running


def through(proxy: FaultProxy, handle: RunHandle) -> RunHandle:
    return dataclasses.replace(handle, tracking_uri=proxy.url)


def logged(handle: RunHandle, name: str) -> list[tuple[int, float]]:
    history = client_for(handle.tracking_uri).get_metric_history(handle.run_id, name)
    return sorted((entry.step, entry.value) for entry in history)


def test_metrics_wait_for_a_server_that_comes_back(proxy: FaultProxy, caplog: pytest.LogCaptureFixture) -> None:
    real = start("s3://d2f/runs/outage")
    proxy.outage_for(3.0)
    through(proxy, real).log_metrics(5, {"loss": 0.5})
    assert "could not log metrics of step 5" in caplog.text
    assert logged(real, "loss") == [(5, 0.5)]


def test_metrics_that_cannot_be_written_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "RETRY_SECONDS", 0.5)
    gone = RunHandle(tracking_uri="http://127.0.0.1:1", experiment_id="0", run_id="0")
    client = client_for(gone.tracking_uri)
    with pytest.raises(TrackingError, match=r"could not ask in [23] attempts over \d+ s"):
        attempt("ask", lambda: client.search_experiments(max_results=1))


def test_a_metric_log_never_waits_and_its_points_arrive_once_with_their_times(
    proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    real = start("s3://d2f/runs/metric-log")
    log = MetricLog(through(proxy, real))
    log.log(0, {"a": 0.0, "b": 0.0})
    proxy.outage_for(3.0)
    began, now = time.monotonic(), time.time()
    for step in range(1, 600):
        log.log(step, {"a": step, "b": -step})
    assert time.monotonic() - began < 1.0
    log.close(60)
    assert log.pending() == [] and "points and" in caplog.text and "the training goes on" in caplog.text
    assert logged(real, "a") == [(step, step) for step in range(600)]
    assert logged(real, "b") == [(step, -step) for step in range(600)]
    history = client_for(real.tracking_uri).get_metric_history(real.run_id, "a")
    assert all(abs(entry.timestamp / 1000 - now) < 2.0 for entry in history), "when it was logged, not when it was sent"


def test_requests_whose_answers_are_lost_double_nothing(proxy: FaultProxy) -> None:
    real = start("s3://d2f/runs/lost-answers")
    proxy.reset_rate = 0.4
    log = MetricLog(through(proxy, real))
    for step in range(40):
        log.log(step, {"a": step})
        time.sleep(0.02)  # several batches
    log.close(60)
    assert logged(real, "a") == [(step, step) for step in range(40)] and proxy.counts["reset"] > 0


def test_a_batch_that_is_sent_twice_is_there_once(stack: StackEnv) -> None:
    handle = start("s3://d2f/runs/twice")
    client = client_for(handle.tracking_uri)
    for _ in range(2):  # the same timestamp: the server keeps one, even while the first request is under way
        client.log_batch(handle.run_id, metrics=[Metric("a", 1.0, 1000, step) for step in range(3)])
    assert logged(handle, "a") == [(0, 1.0), (1, 1.0), (2, 1.0)]


def test_a_killed_run_that_resumes_misses_nothing_and_repeats_nothing(proxy: FaultProxy) -> None:
    real = start("s3://d2f/runs/killed")
    first = MetricLog(through(proxy, real))
    for step in range(10):
        first.log(step, {"loss": step})
    first.close(60)
    first = MetricLog(through(proxy, real))
    proxy.outage = True
    for step in range(10, 15):
        first.log(step, {"loss": step})
    checkpoint = json.dumps(first.pending())
    for step in range(15, 20):  # after the checkpoint, and lost with the process
        first.log(step, {"loss": step})
    with pytest.raises(TrackingError, match=r"10 metric points were not written to MLflow in 1 s"):
        first.close(1)
    proxy.outage = False
    again = MetricLog(through(proxy, real), pending=json.loads(checkpoint))
    for step in (*range(5, 10), *range(15, 25)):  # an older checkpoint repeats some steps
        again.log(step, {"loss": step, "new": 1.0})
    again.close(60)
    assert logged(real, "loss") == [(step, step) for step in range(25)]
    assert [step for step, _ in logged(real, "new")] == [*range(5, 10), *range(15, 25)]


def test_a_run_that_was_deleted_stops_the_log(stack: StackEnv) -> None:
    handle = start("s3://d2f/runs/deleted")
    client_for(handle.tracking_uri).delete_run(handle.run_id)
    log = MetricLog(handle)
    log.log(0, {"a": 1.0})
    with pytest.raises(TrackingError, match="MLflow refused metrics of"):
        log.close(60)
    with pytest.raises(TrackingError, match="MLflow refused metrics of"):
        log.log(1, {"a": 1.0})


def test_pictures_wait_and_the_oldest_give_way(proxy: FaultProxy, caplog: pytest.LogCaptureFixture) -> None:
    real = start("s3://d2f/runs/pictures")
    log = MetricLog(through(proxy, real))
    proxy.outage_for(2.0)
    for step in range(18):
        log.log_image("samples", Image.new("RGB", (8, 8)), step)
    log.close(60)
    assert "dropping samples of step 0" in caplog.text and "dropping samples of step 1" in caplog.text
    again = MetricLog(through(proxy, real))
    again.log_image("samples", Image.new("RGB", (8, 8)), 17)
    again.close(60)
    client = client_for(real.tracking_uri)
    names = [file.path for file in client.list_artifacts(real.run_id, "images") if file.path.endswith(".webp")]
    assert sorted(int(name.split("+")[2]) for name in names) == list(range(2, 18))
    assert "samples.png" in [file.path for file in client.list_artifacts(real.run_id)]


def test_a_metric_with_a_threshold_in_its_name_is_kept_under_a_name_that_mlflow_takes(
    registered: tuple[RunHandle, str],
) -> None:
    handle, _ = registered
    handle.log_metrics(3, {"pck@0.1": 0.5})
    log = MetricLog(handle)
    log.log(4, {"pck@0.1": 0.75, "sonst (é)": 1.0})
    log.close(30)
    assert run_metrics(handle, 3) == {"pck_at_0.1": 0.5}
    assert run_metrics(handle, 4) == {"pck_at_0.1": 0.75, "sonst _é_": 1.0}
