"""Evaluation of a checkpoint: its model is built, evaluated in the training's precision, and what was found is kept."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image
from torch import nn

from d2f_core import storage
from d2f_core.tracking import RunHandle
from d2f_core.tracking.metric_log import MetricLog
from d2f_core.train import checkpoint, retention
from d2f_core.train.config import TrainConfig
from d2f_core.train.precision import DTYPES
from d2f_core.train.task import BuildTask, Task
from d2f_core.train.weights import load_parameters

FLAT = 2.0
"""Standard deviation of pixel values (0 to 255) below which an image counts as flat."""
FLUSH_SECONDS = 60.0
SECONDS = "evaluation_seconds"
"""Name of the metric that says how long an evaluation took, in MLflow alone: it is no property of the checkpoint."""


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
    precision: str = "fp32"
    """Dtype of the network while it is evaluated, the training's own: fp32, bf16 or fp16."""
    num_gpus: float
    """GPUs that an evaluation in a Ray task of its own reserves; 0: a CPU."""
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


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation found, and its cost."""

    metrics: Mapping[str, float]
    load_seconds: float
    """Seconds until the model was built and its weights were read."""
    seconds: float
    """Seconds of the whole evaluation, `load_seconds` included."""

    def __str__(self) -> str:
        found = "  ".join(f"{name} {value:.4g}" for name, value in self.metrics.items()) or "done"
        return f"{found}  ({self.seconds:.1f} s, of which {self.load_seconds:.1f} s to load the model)"


def evaluate(job: EvaluationJob, device: str) -> Evaluated:
    """Build the model on the device, load the checkpoint's weights, evaluate, and store the metrics.

    Raises:
        CollapseError: all images are flat, or a metric is not finite.
    """
    began = time.perf_counter()
    task = job.build_task(device)
    if task.evaluate:
        _load(job, task.module)
        # An engine moves and casts a worker's module; here nobody else would.
        task.module.to(device=device, dtype=DTYPES[job.precision]).eval()
    return _look(job, task, began)


def evaluate_in_place(job: EvaluationJob, task: Task) -> Evaluated:
    """As `evaluate`, with the module that is being trained in this process, which has its own weights again afterwards.

    That takes no second network. The module must hold its weights whole (ZeRO stages 0 to 2). Without a checkpoint
    (`job.uri` is None) it must not have been trained yet.
    """
    began = time.perf_counter()
    with _restored(task.module):
        _load(job, task.module)
        task.module.eval()
        return _look(job, task, began)


def _load(job: EvaluationJob, module: nn.Module) -> None:
    if job.uri:
        load_parameters(module, checkpoint.read_checkpoint(job.uri), "ema" if job.averaged else "weights")


@contextlib.contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Put the module's trained weights, bit for bit, and its modes back at the end; meanwhile they lie on the host."""
    weights = {
        parameter: parameter.detach().to("cpu", copy=True)
        for parameter in module.parameters()
        if parameter.requires_grad
    }
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for parameter, kept in weights.items():
            parameter.data.copy_(kept)
        for part, training in modes.items():
            part.training = training


def _look(job: EvaluationJob, task: Task, began: float) -> Evaluated:
    """Evaluate the task's module, which holds the right weights, and store the metrics; `began` is the start's time."""
    loaded = time.perf_counter() - began
    if task.evaluate is None:
        job.keep({})
        return Evaluated(metrics={}, load_seconds=loaded, seconds=loaded)
    with torch.no_grad():
        result = task.evaluate()
    found = Evaluated(metrics=dict(result.metrics), load_seconds=loaded, seconds=time.perf_counter() - began)
    if job.tracker:
        _log(job.tracker, job.step, found, task.make_grid(result.images) if result.images and task.make_grid else None)
    bad = {name: value for name, value in found.metrics.items() if not np.isfinite(value)}
    if bad or (result.images and all(is_flat(image) for image in result.images)):
        raise CollapseError(
            f"step {job.step}: "
            + (f"the evaluation found {bad}" if bad else f"all {len(result.images)} images drawn are flat")
            + ". The model has collapsed: lower the learning rate, or raise the warm-up, and train in another output.",
            job.step,
        )
    job.keep(dict(found.metrics))
    return found


def _log(tracker: RunHandle, step: int, found: Evaluated, grid: Image | None) -> None:
    log = MetricLog(tracker)
    log.log(step, {**found.metrics, SECONDS: found.seconds})
    if grid:
        log.log_image("samples", grid, step)
    log.close(FLUSH_SECONDS)
