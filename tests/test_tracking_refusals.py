"""What tracking and registry refuse by themselves, and what they make of a server's answers; needs no server."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, RESOURCE_ALREADY_EXISTS

from d2f_core import retry
from d2f_core.tracking import (
    NewVersion,
    RunHandle,
    TrackingError,
    aliases,
    model_version,
    promote,
    publish,
    register_model,
    registry,
    runs,
    start_run,
    tracking_uri,
)
from d2f_core.tracking.server import attempt, tag_equals

HANDLE = RunHandle(tracking_uri="http://mlflow", experiment_id="1", run_id="f00")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow/")


def use(monkeypatch: pytest.MonkeyPatch, module: Any, **calls: Any) -> None:
    """Let a module's client have these calls alone."""
    client = SimpleNamespace(tracking_uri="http://mlflow", **calls)
    monkeypatch.setattr(module, "client_for", lambda _: client)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "MLFLOW_TRACKING_URI is not set. It must name an MLflow server"),
        ("http://me:secret@mlflow", "holds a user, password, token or query .* set MLFLOW_TRACKING_USERNAME"),
        ("http://[mlflow", r"MLFLOW_TRACKING_URI is no address \(.*\)\. It must be one such as http://127"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_and_a_password_never_shown(
    monkeypatch: pytest.MonkeyPatch, uri: str, message: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match=message) as caught:
        tracking_uri()
    assert "secret" not in str(caught.value)


def test_a_quote_that_a_search_cannot_express_is_refused() -> None:
    assert tag_equals("k", "s3://b/run") == "tags.`k` = 's3://b/run'"
    with pytest.raises(TrackingError, match=r"\"s3://b/it's\" holds a single quote, .* Rename it"):
        tag_equals("k", "s3://b/it's")


def test_a_refusal_is_not_repeated() -> None:
    calls: list[int] = []

    def refuse() -> None:
        calls.append(1)
        raise MlflowException("no\nrights", error_code=PERMISSION_DENIED)

    with pytest.raises(TrackingError, match=r"MLflow refused to ask: .*no rights"):
        attempt("ask", refuse)
    assert calls == [1]


@pytest.mark.parametrize(
    "uri", ["models:/m", "models:/m@", "models:/m/latest", "models:/m/1/x", "models:/m@a/1", "m/1"]
)
def test_an_address_of_no_version_is_refused_before_the_server_is_asked(
    monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    use(monkeypatch, registry)
    with pytest.raises(TrackingError, match=r"is not models:/NAME@ALIAS or models:/NAME/VERSION\. Correct it"):
        model_version(uri)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"description": "a" * 5001}, "has 5001 characters; MLflow keeps 5000. Shorten it"),
        ({"files": {"../README.md": b""}}, r"file '\.\./README\.md' must be a plain name"),
        ({"files": {"weights.safetensors": b""}}, "'weights.safetensors' must .* Put it into the model's directory"),
    ],
)
def test_a_version_that_mlflow_would_cut_or_that_changes_the_models_hash_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    plain: dict[str, Any] = {"model_dir": "x", "name": "m", "model_type": "t", "tags": {}, "description": ""}
    with pytest.raises(TrackingError, match=message):
        NewVersion(**{**plain, **fields})


def test_a_directory_that_is_not_there_is_not_registered(tmp_path: Path) -> None:
    new = NewVersion(model_dir=tmp_path / "none", name="m", model_type="t", tags={}, description="")
    with pytest.raises(TrackingError, match=r"none' is not a directory\. Give that of an exported model"):
        register_model(HANDLE, new)


def test_an_alias_that_promotions_move_is_not_moved_by_registering(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = SimpleNamespace(aliases={"prod": "2"}, tags={"d2f.previous.prod": "1", "d2f.previous.candidate": "1"})
    version = SimpleNamespace(name="m", version="3", tags={}, run_id="")
    moved: list[tuple[str, ...]] = []
    use(
        monkeypatch, registry, search_registered_models=lambda _: [model], get_registered_model=lambda _: model,
        search_model_versions=lambda _: [version], set_registered_model_alias=lambda *which: moved.append(which),
    )  # fmt: skip
    new = NewVersion(model_dir=tmp_path, name="m", model_type="t", tags={}, description="")
    with pytest.raises(TrackingError, match=r"'prod': promotions move m@prod, .*such as candidate, .*--alias prod"):
        register_model(HANDLE, new, alias="prod")
    for alias in ("candidate", "mine"):
        register_model(HANDLE, new, alias=alias)
    assert moved == [("m", "candidate", "3"), ("m", "mine", "3")]


@pytest.mark.parametrize(
    ("status", "source", "message"),
    [
        ("FAILED_REGISTRATION", "models:/m-1", "models:/m/2 is FAILED_REGISTRATION, but must be READY"),
        ("READY", "s3://elsewhere/model", "models:/m/2 is not of a logged model, but must be READY"),
        ("READY", "models:/m-1", "models:/m/2 is PENDING, but must be READY: .* Run pipelines.register again"),
    ],
)
def test_a_version_that_is_not_complete_is_not_promoted(
    monkeypatch: pytest.MonkeyPatch, status: str, source: str, message: str
) -> None:
    version = SimpleNamespace(status=status, source=source, version="2", name="m", tags={}, run_id="")
    pending = SimpleNamespace(status="PENDING")
    use(monkeypatch, aliases, get_model_version=lambda *_: version, get_logged_model=lambda _: pending)
    with pytest.raises(TrackingError, match=message):
        promote("m", "2")


def begin(experiment: str) -> None:
    start_run(experiment=experiment, run_key="s3://b/run", name="n", config_yaml="", params={}, tags={})


def test_a_deleted_experiment_is_refused_and_one_that_another_process_makes_meanwhile_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone, there = (SimpleNamespace(experiment_id="4", lifecycle_stage=stage) for stage in ("deleted", "active"))
    use(monkeypatch, runs, get_experiment_by_name=lambda _: gone)
    with pytest.raises(TrackingError, match=r"experiment 'old' is deleted. Restore it, or choose another name"):
        begin("old")
    found, searched = [None, there], []

    def taken(_: str) -> None:
        raise MlflowException("exists", error_code=RESOURCE_ALREADY_EXISTS)

    def search(experiments: list[str], *_: Any, **__: Any) -> None:
        searched.extend(experiments)
        raise MlflowException("as far as this test goes", error_code=PERMISSION_DENIED)

    calls = {"create_experiment": taken, "search_runs": search}
    use(monkeypatch, runs, get_experiment_by_name=lambda _: found.pop(0), **calls)
    with pytest.raises(TrackingError, match="as far as"):
        begin("new")
    assert searched == ["4"]
    use(monkeypatch, runs, get_experiment_by_name=lambda _: None, **calls)
    with pytest.raises(TrackingError, match=r"neither finds nor creates the experiment 'x'. Choose another name"):
        begin("x")


def test_a_training_that_mlflow_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "find_run", lambda **_: None)
    with pytest.raises(TrackingError, match=r"no run of 's3://b/run' in the experiment 'e'\. Give the experiment that"):
        publish.training_run("s3://b/run", "e")


def test_metrics_are_the_checkpoints_own_and_damaged_ones_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(publish, "run_metrics", lambda _, step: {"of the run": step})
    place, training = tmp_path / "evaluation.json", {"checkpoint": str(tmp_path), "step": 4}
    assert publish.checkpoint_metrics(HANDLE, {}) == {}
    assert publish.checkpoint_metrics(HANDLE, training) == {"of the run": 4}
    place.write_text(json.dumps({"metrics": {"loss": 1}}))
    assert publish.checkpoint_metrics(HANDLE, training) == {"loss": 1.0}
    for damaged in ('{"metrics": {"loss": "x"}}', '{"metr', "[]", "{}"):
        place.write_text(damaged)
        with pytest.raises(
            TrackingError, match=r"evaluation\.json is damaged \(.*\)\. Delete it, and resume the training"
        ):
            publish.checkpoint_metrics(HANDLE, training)
