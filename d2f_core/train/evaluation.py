"""Evaluation of a checkpoint in its own Ray task, without blocking the training."""

import json
import logging
import os
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from PIL.Image import Image
from ray.exceptions import RayError, RayTaskError

from d2f_core import storage
from d2f_core.device import reserved_device
from d2f_core.tracking import RunHandle
from d2f_core.tracking.metric_log import MetricLog
from d2f_core.train import checkpoint, retention
from d2f_core.train.config import TrainConfig
from d2f_core.train.task import BuildTask
from d2f_core.train.weights import load_parameters

logger = logging.getLogger(__name__)

FLAT = 2.0
"""Standard deviation of pixel values (0 to 255) below which an image counts as flat."""
FLUSH_SECONDS = 60.0
LEAST_PRIORITY = 19


class CollapseError(RuntimeError):
    """The model of a step generates only flat images, or its metrics are not finite."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message, step)  # both arguments, so that it can be pickled
        self.step = step

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    build_task: BuildTask
    output: str
    step: int
    uri: str | None
    """URI of the checkpoint; None before the first step, for the model as the task builds it."""
    averaged: bool
    """Evaluate the averaged (EMA) weights."""
    num_gpus: float
    tracker: RunHandle | None

    @property
    def _untrained(self) -> str:
        return storage.join(self.output, "evaluation-untrained.json")

    def done(self) -> bool:
        """Whether the job's metrics are already stored."""
        if self.uri is None:
            return storage.exists(self._untrained)
        return retention.read_evaluation(self.uri) is not None

    def keep(self, metrics: dict[str, float]) -> None:
        if self.uri is None:
            storage.write_bytes(self._untrained, json.dumps(metrics, sort_keys=True).encode())
        else:
            retention.write_evaluation(self.uri, metrics)


def evaluation_due(config: TrainConfig, step: int) -> bool:
    return bool(config.evaluate_every) and (step % config.evaluate_every == 0 or step == config.num_steps)


def is_flat(image: Image) -> bool:
    return bool(np.asarray(image, dtype=np.float32).std() < FLAT)


def evaluate(job: EvaluationJob) -> dict[str, float]:
    """Build the model, load the checkpoint's weights, evaluate, and store the metrics.

    Raises:
        CollapseError: all images are flat, or a metric is not finite.
    """
    torch.set_num_threads(1)
    device = reserved_device()
    task = job.build_task(device)
    if task.evaluate is None:
        job.keep({})
        return {}
    if job.uri:
        found = checkpoint.read_checkpoint(job.uri)
        load_parameters(task.module, found, "ema" if job.averaged else "weights")
    task.module.to(device).eval()  # an engine does it for a worker; here nobody else would
    with torch.no_grad():
        result = task.evaluate()
    metrics = dict(result.metrics)
    if job.tracker:
        log = MetricLog(job.tracker)
        log.log(job.step, metrics)
        if result.images and task.make_grid:
            log.log_image("samples", task.make_grid(result.images), job.step)
        log.close(FLUSH_SECONDS)
    bad = {name: value for name, value in metrics.items() if not np.isfinite(value)}
    if bad or (result.images and all(is_flat(image) for image in result.images)):
        raise CollapseError(
            f"step {job.step}: "
            + (f"the evaluation found {bad}" if bad else f"all {len(result.images)} images drawn are flat")
            + ". The model has collapsed: lower the learning rate, or raise the warm-up, and train in another output.",
            job.step,
        )
    job.keep(metrics)
    return metrics


def evaluate_beside(job: EvaluationJob) -> dict[str, float]:
    """`evaluate` at the lowest CPU priority: otherwise it would double the time of the training's first steps."""
    if not job.num_gpus:
        os.setpriority(os.PRIO_PROCESS, 0, LEAST_PRIORITY)
    return evaluate(job)


class Evaluations:
    """Queue of a training's evaluations, run one at a time; their checkpoints are protected from deletion until then.

    Parallel evaluations would each load libraries and weights, possibly on the training's own nodes, and would pile up
    if an evaluation takes longer than the interval.
    """

    def __init__(self, protected: set[str]) -> None:
        self._protected = protected
        self._jobs: deque[EvaluationJob] = deque()
        """Queued jobs; the first one is running."""
        self._result: Any = None
        """Ray reference to the first job's result."""

    def start(self, job: EvaluationJob) -> None:
        """Queue the job; a step that is already queued is ignored."""
        if any(job.step == other.step for other in self._jobs):
            return
        if job.uri:
            self._protected.add(job.uri)
        self._jobs.append(job)
        if len(self._jobs) == 1:
            self._begin()

    def poll(self, timeout: float = 0.0) -> None:
        """Collect finished evaluations, and start the next.

        Args:
            timeout: seconds to wait for each evaluation.

        Raises:
            CollapseError: an evaluation found a collapsed model.
        """
        while self._jobs and ray.wait([self._result], timeout=timeout)[0]:
            job = self._jobs.popleft()
            self._protected.discard(job.uri or "")
            try:
                logger.info("step %d  evaluation %s", job.step, _rounded(ray.get(self._result)))
            except RayTaskError as error:
                if isinstance(error.cause, CollapseError):
                    raise error.cause from None
                logger.error("step %d  evaluation failed, it is repeated at the end: %s", job.step, error.cause)
            except RayError as error:
                logger.error("step %d  evaluation failed, it is repeated at the end: %s", job.step, error)
            self._begin()

    def _begin(self) -> None:
        if self._jobs:
            gpus = self._jobs[0].num_gpus
            remote = ray.remote(num_cpus=0 if gpus else 1, num_gpus=gpus, max_retries=2)(evaluate_beside)
            self._result = remote.remote(self._jobs[0])


def _rounded(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()) or "done"
