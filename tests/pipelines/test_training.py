"""How a training's MLflow run ends when the training does not reach its last step."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from d2f_core.batch.run_log import RunLog
from d2f_core.resources import InsufficientResourcesError
from d2f_core.tracking import RunHandle, TrackingError, runs
from d2f_core.train.config import TrainConfig
from d2f_core.train.launch import TrainingStoppedError
from pipelines import training

RUN = RunHandle(tracking_uri="http://mlflow", experiment_id="1", run_id="r")


@dataclass(frozen=True)
class Config:
    output: str
    train: TrainConfig = field(default_factory=TrainConfig)
    experiment: str = "e"
    name: str = "n"


@dataclass
class Server:
    """What MLflow keeps of the run."""

    status: str = "RUNNING"
    tags: dict[str, str] = field(default_factory=dict)
    refuses: bool = False
    paths: list[dict[str, Any]] = field(default_factory=list)
    """That the nodes were asked for."""

    def set_terminated(self, run_id: str, status: str) -> None:
        self.status = status

    def set_tag(self, run_id: str, name: str, value: str) -> None:
        if self.refuses:
            raise TrackingError("no")
        self.tags[name] = value


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(runs, "client_for", lambda uri: server)
    monkeypatch.setattr(training, "connect", lambda **paths: server.paths.append(paths))
    monkeypatch.setattr(training, "start_run", lambda **_: RUN)
    return server


def trained(monkeypatch: pytest.MonkeyPatch, output: Path, *, ends_with: BaseException | None) -> None:
    """A training in which the driver meets this error."""

    def run_training(**_: Any) -> SimpleNamespace:
        if ends_with:
            raise ends_with
        return SimpleNamespace(last=SimpleNamespace(uri="u", manifest=SimpleNamespace(step=1)), owed=())

    monkeypatch.setattr(training, "run_training", run_training)
    job: Any = SimpleNamespace(
        config=Config(str(output)), tags={}, build_task=None, plan=None, identity="i", export=lambda last: "model",
        reads={"latents": "/data"}, worker_bytes=None,
    )  # fmt: skip
    training.train(job)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (
            TrainingStoppedError("NonFiniteLossError: the loss\nof step 4"),
            "FAILED",
            "NonFiniteLossError: the loss of step 4",
        ),
        (InsufficientResourcesError("8 workers do not fit"), "FAILED", "8 workers do not fit"),
        (SystemExit(143), "KILLED", "SIGTERM"),
        (SystemExit(3), "FAILED", "exit code 3"),
        (KeyboardInterrupt(), "KILLED", "interrupted"),
        (RuntimeError(), "FAILED", "RuntimeError"),
    ],
)
def test_a_training_that_ends_early_ends_its_run_with_the_reason(
    error: BaseException, status: str, reason: str, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(type(error)):
        trained(monkeypatch, tmp_path, ends_with=error)
    assert (server.status, server.tags) == (status, {"d2f.end_reason": reason})


def test_a_training_that_reaches_its_end_finishes_its_run(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained(monkeypatch, tmp_path, ends_with=None)
    assert (server.status, server.tags) == ("FINISHED", {})
    assert server.paths == [{"reads": {"latents": "/data"}, "writes": {"output": str(tmp_path)}}]


def test_a_server_that_refuses_does_not_hide_why_a_training_ended(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.refuses = True
    with pytest.raises(TrainingStoppedError, match="collapsed"):
        trained(monkeypatch, tmp_path, ends_with=TrainingStoppedError("the model has collapsed"))
    assert "stays RUNNING in MLflow: no" in caplog.text


def test_a_batch_job_that_fails_ends_its_run_though_its_metrics_are_not_written(server: Server) -> None:
    def close(seconds: float) -> None:
        raise TrackingError("3 points were not written")

    log = RunLog("e", "s3://there/out", Config("o"), Config("o"), {})
    log._run, log._log = RUN, SimpleNamespace(close=close)  # type: ignore[assignment]
    log.__exit__(RuntimeError, RuntimeError("no space"), None)
    assert (server.status, server.tags["d2f.end_reason"]) == ("FAILED", "no space")
    with pytest.raises(TrackingError):
        log.__exit__(None, None, None)
    assert (server.status, server.tags["d2f.end_reason"]) == ("FAILED", "3 points were not written")
