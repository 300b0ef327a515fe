"""A batch job's own MLflow run, if a server is configured: its config, plan and progress."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from d2f_core.tracking import MetricLog, RunHandle, TrackingError, ending, start_run

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 60.0


class RunLog:
    """Context manager around a job's work: starts its run, or resumes the run of an earlier attempt, and ends it.

    Without MLFLOW_TRACKING_URI, or with an empty experiment, nothing is logged.
    """

    def __init__(self, experiment: str, output: str, config: Any, plan: Any, tags: Mapping[str, str]) -> None:
        """
        Args:
            output: the run's key and, by its last part, its name.
            config: dataclass, logged as config.yaml.
            plan: dataclass, logged as parameters.
        """
        self._experiment, self._output, self._config, self._plan = experiment, output, config, plan
        self._tags = {**tags, "d2f.output": output}
        self._run: RunHandle | None = None
        self._log: MetricLog | None = None

    def __enter__(self) -> "RunLog":
        if self._experiment and os.environ.get("MLFLOW_TRACKING_URI"):
            self._run = start_run(
                experiment=self._experiment,
                run_key=self._output,
                name=self._output.rstrip("/").rsplit("/", 1)[-1],
                config_yaml=yaml.safe_dump(json.loads(json.dumps(asdict(self._config))), sort_keys=False),
                params=asdict(self._plan),
                tags=self._tags,
            )
            self._log = MetricLog(self._run)
            logger.info("MLflow run: %s", self._run.url)
        return self

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics at a step; they are sent in the background."""
        if self._log:
            self._log.log(step, values)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not (self._run and self._log):
            return
        if error is None:
            with ending(self._run):
                self._log.close(FLUSH_SECONDS)
            return
        try:
            self._log.close(FLUSH_SECONDS)
        except TrackingError as unsent:  # the job's own error is what counts
            logger.warning("%s", unsent)
        self._run.end_after(error)
