"""Reads from a run: tags, metrics at a step, files."""

import tempfile
from pathlib import Path

from d2f_core.tracking.runs import RunHandle
from d2f_core.tracking.server import attempt, client_for


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
