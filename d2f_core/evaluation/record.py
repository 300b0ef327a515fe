"""Records an evaluation: files at its output, and an MLflow run with charts over the number of network evaluations."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import yaml

from d2f_core.evaluation.estimates import Metric
from d2f_core.storage import join, write_bytes
from d2f_core.tracking import ending, start_run

logger = logging.getLogger(__name__)


def write_files(output: str, files: Mapping[str, bytes]) -> None:
    """Write files, given by name, at the output."""
    for name, content in files.items():
        write_bytes(join(output, name), content)


def log_evaluation(
    config: Any,
    *,
    name: str,
    tags: Mapping[str, str],
    metrics: Mapping[str, Metric],
    counts: Iterable[int],
    files: Mapping[str, bytes],
    values: Mapping[str, float] | None = None,
) -> None:
    """Log an evaluation as an MLflow run; does nothing when `config.experiment` is empty.

    Args:
        config: dataclass with `experiment` and `output`, which is the run's key.
        counts: numbers of network evaluations; each is a step of the run, with ROLE/METRIC of every role.
        files: artifacts by name.
        values: further metrics, at step 0.
    """
    if not config.experiment:
        return
    run = start_run(
        experiment=config.experiment,
        run_key=config.output,
        name=name,
        config_yaml=yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False),
        params=asdict(config),
        tags=tags,
    )
    with ending(run):
        for count in counts:
            run.log_metrics(count, _at(metrics, count))
        if values:
            run.log_metrics(0, values)
        run.log_files(files)
    logger.info("MLflow run: %s", run.url)


def _at(metrics: Mapping[str, Metric], count: int) -> dict[str, float]:
    """The run's metrics at the step `count`."""
    return {
        f"{role}/{metric.name}": values[count].value
        for metric in metrics.values()
        for role, values in metric.values.items()
        if count in values
    }
