"""One MLflow run per training: its config, metrics and pictures.

Nothing here keeps state in the process: a `RunHandle` is three strings and can be sent to any worker.
"""

import contextlib
import logging
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d2f_core.retry import one_line
from d2f_core.tracking.server import (
    TrackingError,
    attempt,
    attempt_upload,
    client_for,
    metric_name,
    tag_equals,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from PIL import Image

logger = logging.getLogger(__name__)

RUN_KEY_TAG = "d2f.run_key"
END_TAG = "d2f.end_reason"
"""Why a run ended before its last step; none while it runs, and none when it finished."""
END_SECONDS = 10.0
"""How long a server that is away is told of such an end: what is ending is not held up longer."""
SIGNALS = {128 + signal.SIGTERM, 128 + signal.SIGINT}
MAX_PARAM_CHARS = 6000
MAX_REASON_CHARS = 2000
MAX_PARAMS_PER_CALL = 100


@dataclass(frozen=True, kw_only=True)
class RunHandle:
    """Address of an MLflow run: picklable, and usable in any process that can reach the server."""

    tracking_uri: str
    experiment_id: str
    run_id: str

    @property
    def url(self) -> str:
        """URL of the run's page."""
        return f"{self.tracking_uri}/#/experiments/{self.experiment_id}/runs/{self.run_id}"

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send all metrics of a step in one request, retried while the server is not available; in a loop, use
        `MetricLog`.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)  # fixed, so that a retry does not add a second point
        entries = [Metric(metric_name(name), float(value), now, step) for name, value in metrics.items()]
        client = client_for(self.tracking_uri)
        attempt(f"log metrics of step {step}", lambda: client.log_batch(self.run_id, metrics=entries))

    def log_image(self, name: str, image: "Image.Image", step: int) -> None:
        """Add a picture to the series `name`; MLflow shows the series with a slider over `step`.

        The newest picture is also the artifact `NAME.png`, which MLflow's file browser shows at full size.
        """
        client = client_for(self.tracking_uri)
        attempt(f"log image {name!r}", lambda: client.log_image(self.run_id, image, key=name, step=step))
        attempt(f"log {name}.png", lambda: client.log_image(self.run_id, image, f"{name}.png"))

    def log_text(self, text: str, path: str) -> None:
        """Write a text artifact at `path` inside the run."""
        attempt(f"log {path!r}", lambda: client_for(self.tracking_uri).log_text(self.run_id, text, path))

    def log_file(self, file: Path, directory: str = "") -> None:
        """Copy a local file into `directory` of the run's artifacts."""
        client = client_for(self.tracking_uri)
        attempt_upload(f"log {file.name!r}", lambda: client.log_artifact(self.run_id, str(file), directory or None))

    def log_files(self, files: Mapping[str, bytes]) -> None:
        """Write artifacts, given by name."""
        with tempfile.TemporaryDirectory() as directory:
            for name, data in files.items():
                Path(directory, name).write_bytes(data)
                self.log_file(Path(directory, name))

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        attempt("end the run", lambda: client_for(self.tracking_uri).set_terminated(self.run_id, status))

    def end_early(self, status: Literal["FAILED", "KILLED"], reason: str) -> None:
        """End the run with the reason as a tag; a server that is away or refuses is a warning, for what fails has an
        error of its own."""
        client = client_for(self.tracking_uri)
        try:
            attempt("say why", lambda: client.set_tag(self.run_id, END_TAG, reason), seconds=END_SECONDS)
            attempt("end the run", lambda: client.set_terminated(self.run_id, status), seconds=END_SECONDS)
        except TrackingError as error:
            logger.warning("%s stays RUNNING in MLflow: %s", self.url, error)

    def end_after(self, error: BaseException) -> None:
        """End the run as the error ends the process: KILLED by a signal, FAILED by anything else."""
        code = error.code if isinstance(error, SystemExit) else None
        if isinstance(error, KeyboardInterrupt) or code in SIGNALS:
            self.end_early("KILLED", "interrupted" if code is None else signal.Signals(int(code) - 128).name)
        else:
            self.end_early("FAILED", f"exit code {code}" if code is not None else one_line(error, MAX_REASON_CHARS))


@contextlib.contextmanager
def ending(run: RunHandle | None) -> Iterator[None]:
    """End the run when and as the block ends; None: there is no run."""
    try:
        yield
    except BaseException as error:
        if run:
            run.end_after(error)
        raise
    if run:
        run.finish()


def start_run(
    *,
    experiment: str,
    run_key: str,
    name: str,
    config_yaml: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> RunHandle:
    """Start the run of `run_key`, or return the existing one when a training is resumed.

    Args:
        run_key: identifies the training, e.g. by its output URI.
        config_yaml: the resolved config, stored as the artifact `config.yaml`.
        params: flat or nested; nested names are joined by dots. MLflow allows no changes, so a value that changed since
            the first start keeps its first value there, and is reported in the log.
    """
    uri = tracking_uri()
    client = client_for(uri)
    experiment_id = _experiment_id(client, experiment)
    found = _search(client, experiment_id, run_key)
    all_tags = {**tags, RUN_KEY_TAG: run_key.rstrip("/")}
    if found:
        run = found[0]
        logger.info("continuing MLflow run %s of %s", run.info.run_id, run_key)
        attempt("reopen the run", lambda: client.update_run(run.info.run_id, status="RUNNING"))
        if END_TAG in run.data.tags:
            attempt("take away why it ended", lambda: client.delete_tag(run.info.run_id, END_TAG))
    else:
        run = attempt("create a run", lambda: client.create_run(experiment_id, tags=all_tags, run_name=name))
    handle = RunHandle(tracking_uri=uri, experiment_id=experiment_id, run_id=run.info.run_id)
    _log_params(client, handle.run_id, _flatten(params), run.data.params)
    handle.log_text(config_yaml, "config.yaml")
    return handle


def find_run(*, experiment: str, run_key: str) -> RunHandle | None:
    """The run that `start_run` made for `run_key`; None when there is none."""
    uri = tracking_uri()
    client = client_for(uri)
    there = attempt("look up the experiment", lambda: client.get_experiment_by_name(experiment))
    if there is None:
        return None
    found = _search(client, there.experiment_id, run_key)
    if not found:
        return None
    return RunHandle(tracking_uri=uri, experiment_id=there.experiment_id, run_id=found[0].info.run_id)


def _search(client: "MlflowClient", experiment_id: str, run_key: str) -> "list[Run]":
    """Runs of a key, oldest first; there can be several if two processes started at the same time."""
    query, order = tag_equals(RUN_KEY_TAG, run_key.rstrip("/")), ["attributes.start_time ASC"]
    return list(attempt("look up the run", lambda: client.search_runs([experiment_id], query, order_by=order)))


def _experiment_id(client: "MlflowClient", name: str) -> str:
    for _ in range(2):
        found = attempt("look up the experiment", lambda: client.get_experiment_by_name(name))
        if found is not None and found.lifecycle_stage != "active":
            raise TrackingError(f"MLflow experiment {name!r} is deleted. Restore it, or choose another name.")
        if found is not None:
            return found.experiment_id
        try:
            return attempt("create the experiment", lambda: client.create_experiment(name))
        except TrackingError as error:  # another process created the experiment between the two calls
            logger.info("%s", error)
    raise TrackingError(f"MLflow neither finds nor creates the experiment {name!r}. Choose another name.")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)[:MAX_PARAM_CHARS]
    return flat


def _log_params(client: "MlflowClient", run_id: str, params: dict[str, str], known: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    for name in sorted(params.keys() & known.keys()):
        if params[name] != known[name]:
            logger.warning("param %s is now %s; the run keeps its first value %s", name, params[name], known[name])
    new = [Param(name, value) for name, value in params.items() if name not in known]
    for start in range(0, len(new), MAX_PARAMS_PER_CALL):
        batch = new[start : start + MAX_PARAMS_PER_CALL]
        attempt("log params", lambda batch=batch: client.log_batch(run_id, params=batch))


def run_tags(handle: RunHandle) -> dict[str, str]:
    client = client_for(handle.tracking_uri)
    return dict(attempt("read the run", lambda: client.get_run(handle.run_id)).data.tags)


def run_metrics(handle: RunHandle, step: int) -> dict[str, float]:
    """The metrics that have a point at `step`."""
    client = client_for(handle.tracking_uri)
    metrics = {}
    for name in attempt("read the run", lambda: client.get_run(handle.run_id)).data.metrics:
        history = attempt(f"read {name}", lambda name=name: client.get_metric_history(handle.run_id, name))
        if values := [point.value for point in history if point.step == step]:
            metrics[name] = values[-1]
    return metrics


def run_file(handle: RunHandle, name: str) -> bytes | None:
    """An artifact in the run's top directory; None when there is none."""
    client = client_for(handle.tracking_uri)
    listed = attempt("list the run's files", lambda: client.list_artifacts(handle.run_id))
    if name not in [file.path for file in listed if not file.is_dir]:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        attempt(f"download {name}", lambda: client.download_artifacts(handle.run_id, name, scratch))
        return Path(scratch, name).read_bytes()
