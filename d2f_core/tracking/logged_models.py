"""MLflow's model list: one LoggedModel per registered model and per kept checkpoint, ranked by its metrics."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2f_core.tracking.runs import RunHandle
from d2f_core.tracking.server import attempt, attempt_upload, client_for, metric_name, tag_equals

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

CHECKPOINT_TAG = "d2f.checkpoint"
CHECKPOINT_FILE = "checkpoint.json"
READY = "READY"


def log_checkpoint_model(
    handle: RunHandle,
    *,
    name: str,
    step: int,
    uri: str,
    metrics: Mapping[str, float],
    params: Mapping[str, Any],
) -> str:
    """Add a row for a checkpoint to MLflow's model list, with its metrics; returns the model's id.

    The row holds the checkpoint's URI, but no weights. A repeated call for the same checkpoint changes nothing; a call
    that was killed is completed.

    Args:
        name: name in the list; must not contain any of / : . % " '.
        uri: the checkpoint, which identifies the row.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses the name.
    """
    client = client_for(handle.tracking_uri)
    # MLflow's own tag for models whose weights are stored elsewhere, for which its pages offer no download.
    tags = {CHECKPOINT_TAG: uri.rstrip("/"), "mlflow.model.isExternal": "true", "step": str(step)}
    values = {key: str(value) for key, value in params.items()}
    model = logged_model(
        client, handle, key=CHECKPOINT_TAG, name=name, tags=tags, params=values, model_type="checkpoint"
    )
    if model.status != READY:
        content = {"uri": uri.rstrip("/"), "step": step, "run_id": handle.run_id, "metrics": dict(metrics)}
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch, CHECKPOINT_FILE).write_text(json.dumps(content, indent=1, sort_keys=True))
            upload(client, model, Path(scratch))
        complete(client, handle, model, step=step, metrics=metrics)
    return model.model_id


def logged_model(
    client: "MlflowClient",
    handle: RunHandle,
    *,
    key: str,
    name: str,
    tags: Mapping[str, str],
    model_type: str,
    params: Mapping[str, str] | None = None,
) -> "LoggedModel":
    """The run's LoggedModel whose tag `key` has the value in `tags`: an existing one, complete or not, or a new one."""
    query = tag_equals(key, tags[key])
    found = attempt("look up the model", lambda: client.search_logged_models([handle.experiment_id], query))
    model = next((one for one in found if one.source_run_id == handle.run_id), None)
    if model is not None:
        return model
    make: Callable[[], Any] = lambda: client.create_logged_model(  # noqa: E731
        handle.experiment_id,
        name=name,
        source_run_id=handle.run_id,
        tags=dict(tags),
        params=dict(params or {}),
        model_type=model_type,
    )
    return attempt("create the model", make)


def upload(client: "MlflowClient", model: "LoggedModel", directory: Path, place: str | None = None) -> None:
    """Copy a directory's files to `place` inside the model's artifacts."""
    attempt_upload("upload the model", lambda: client.log_model_artifacts(model.model_id, str(directory), place))


def complete(
    client: "MlflowClient", handle: RunHandle, model: "LoggedModel", *, step: int, metrics: Mapping[str, float]
) -> None:
    """Log an uploaded model's metrics and link it to the run's step, then declare it READY."""
    from mlflow.entities import LoggedModelOutput

    model_id = model.model_id
    _log_metrics(client, handle, model_id, step, metrics)
    run = attempt("read the run", lambda: client.get_run(handle.run_id))
    listed = {output.model_id for output in run.outputs.model_outputs} if run.outputs else set()
    if model_id not in listed:
        output = LoggedModelOutput(model_id, step)
        attempt("list the model in the run", lambda: client.log_outputs(handle.run_id, [output]))
    attempt("complete the model", lambda: client.finalize_logged_model(model_id, READY))


def _log_metrics(
    client: "MlflowClient", handle: RunHandle, model_id: str, step: int, metrics: Mapping[str, float]
) -> None:
    from mlflow.entities import Metric

    entries = []
    for name, value in ((metric_name(name), value) for name, value in metrics.items()):
        if math.isfinite(value):
            # MLflow also writes a model's metric to the run, where it would be a second point at that step unless it
            # has the first point's timestamp.
            history = attempt(f"read {name}", lambda name=name: client.get_metric_history(handle.run_id, name))
            times = [point.timestamp for point in history if point.step == step and point.value == value]
            time_ms = times[0] if times else int(time.time() * 1000)
            entries.append(Metric(name, float(value), time_ms, step, model_id=model_id))
    if entries:
        attempt("log the model's metrics", lambda: client.log_batch(handle.run_id, metrics=entries))
