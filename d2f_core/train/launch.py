"""Start a training on the cluster, restart it after failures, and say what is missing when it cannot go on."""

import bisect
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer

from d2f_core import storage
from d2f_core.data.plan import StreamPlan
from d2f_core.data.quarantine import BadSample, write_quarantine
from d2f_core.data.table_reader import DamagedDataError
from d2f_core.storage import StorageError
from d2f_core.tracking import RunHandle, TrackingError, log_checkpoint_model
from d2f_core.tracking.metric_log import MetricLog
from d2f_core.train import checkpoint, restore, retention
from d2f_core.train.checkpoint import Checkpoint, CheckpointError
from d2f_core.train.config import TrainConfig
from d2f_core.train.evaluation import CollapseError, Evaluations
from d2f_core.train.heartbeat import ask, start_pulse, watched
from d2f_core.train.interruption import Failures, terminable, terminated, usable_resources
from d2f_core.train.quarantine import QuarantineLimitError
from d2f_core.train.steps import NonFiniteLossError
from d2f_core.train.task import BuildTask
from d2f_core.train.worker import EVALUATION_SECONDS, WorkerJob, run_worker
from d2f_core.train.zero import NonFiniteGradientError

logger = logging.getLogger(__name__)

RESOURCE_WAIT_SECONDS = 60
FLUSH_SECONDS = 120.0
HEALTH_CHECK_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"

FINAL = (
    NonFiniteLossError,
    NonFiniteGradientError,
    CollapseError,
    QuarantineLimitError,
    DamagedDataError,
    CheckpointError,
    StorageError,
    ValueError,
)
"""A restart would end in the same error."""


class NotEnoughResourcesError(ValueError):
    """The cluster cannot hold the training that was asked for."""


class TrainingStoppedError(ValueError):
    """A training that ended before its last step: why, and from where it goes on."""


def fitting_workers(config: TrainConfig, *, wait_seconds: float) -> int:
    """How many workers the cluster can hold, at most `num_workers` and at least `min_workers`.

    An autoscaling cluster may grow: nodes are given `wait_seconds` to come before fewer workers are taken. A node that
    was announced to go does not count.

    Raises:
        NotEnoughResourcesError: there is no room for the fewest; says what is missing.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        total = usable_resources()
        fitting = [number for number in config.worker_counts if not _short(_needed(config, number), total)]
        if fitting and (fitting[0] == config.num_workers or time.monotonic() >= deadline):
            break
        if time.monotonic() >= deadline:
            fewest = config.worker_counts[-1]
            needed = _needed(config, fewest)
            short = _short(needed, total)
            name = "num_workers" if fewest == config.num_workers else "min_workers"
            has = ", ".join(f"{total.get(resource, 0):g} {resource}" for resource in short)
            wants = ", ".join(f"{needed[resource]:g} {resource}" for resource in short)
            raise NotEnoughResourcesError(
                f"{name}={fewest} needs {wants} (each worker, its reader and one evaluation), the cluster has {has}. "
                f"Lower --train.{name.replace('_', '-')} or --train.cpus-per-worker, or add nodes."
            )
        time.sleep(1)
    if fitting[0] < config.num_workers:
        logger.warning("the cluster has room for %d of %d workers: going on with those", fitting[0], config.num_workers)
    return fitting[0]


def _needed(config: TrainConfig, num_workers: int) -> dict[str, float]:
    needed: dict[str, float] = {"CPU": num_workers * (config.cpus_per_worker + 0.5) + 1}
    if config.use_gpu:
        needed["GPU"] = num_workers + config.evaluation_gpus
    return needed


def _short(needed: Mapping[str, float], total: Mapping[str, float]) -> list[str]:
    return [name for name, amount in needed.items() if total.get(name, 0) < amount]


def run_training(
    *,
    config: TrainConfig,
    build_task: BuildTask,
    plan: StreamPlan,
    output: str,
    identity: str,
    tracker: RunHandle | None = None,
) -> Checkpoint:
    """Train to the last step, from the newest whole checkpoint under `output` if there is one.

    Args:
        identity: hash of what must stay the same for a checkpoint to belong to this run.

    Returns:
        The last checkpoint.

    Raises:
        NotEnoughResourcesError: the cluster is too small.
        CheckpointError: `output` holds a run of another configuration.
        TrainingStoppedError: workers died more often than `max_failures`, or of something that a restart cannot mend.
        SystemExit: SIGTERM ended it, after a checkpoint.
    """
    job = WorkerJob(config=config, build_task=build_task, plan=plan, output=output, identity=identity, tracker=tracker)
    failures = Failures()
    with terminable() as termination:
        while not (last := _complete(config, output, identity)):
            workers = fitting_workers(config, wait_seconds=RESOURCE_WAIT_SECONDS)
            termination.pulse = pulse = start_pulse()
            try:
                now = replace(config, num_workers=workers, min_workers=0)
                _attempt(replace(job, config=now, attempt=uuid.uuid4().hex[:8], pulse=pulse))
            except (ray.train.TrainingFailedError, RayError) as error:
                if termination.asked:
                    logger.warning("the attempt ended: %s", _reason(error))
                else:
                    _after_failure(job, error, pulse, failures)
            finally:
                termination.pulse = None
                ray.kill(pulse)
            if termination.asked:
                raise terminated(output, identity)
    _settle(job, last)
    return last


def _after_failure(job: WorkerJob, error: BaseException, pulse: Any, failures: Failures) -> None:
    """Say why an attempt ended, and from where the next one goes on.

    Raises:
        TrainingStoppedError: there must not be another attempt.
    """
    counts, limit = failures.add(error, pulse), job.config.max_failures
    reason, final = _reason(error), _is_final(error)
    workers = "; ".join(ask(pulse.report, default=[]))
    there = checkpoint.candidates(job.output, job.identity)
    place = f"The last good checkpoint is {there[0].uri}." if there else "There is no checkpoint yet."
    if final or (counts and 0 <= limit < failures.counted):
        tail = "" if final else f" That was failure {failures.counted}, max_failures={limit}."
        raise TrainingStoppedError(f"{reason}{tail} {place} The same command again resumes.") from None
    what = f"Restart {failures.counted}" if counts else "Restart without counting it: a node was announced to go"
    logger.warning("the attempt ended: %s (%s). %s. %s", reason, workers, what, place)


def _complete(config: TrainConfig, output: str, identity: str) -> Checkpoint | None:
    found = checkpoint.candidates(output, identity)
    if found and found[0].manifest.step >= config.num_steps:
        logger.info("training is complete at step %d: %s", found[0].manifest.step, found[0].uri)
        return found[0]
    return None


def _attempt(job: WorkerJob) -> None:
    config = job.config
    trainer = TorchTrainer(
        run_worker,  # type: ignore[arg-type]
        train_loop_config=job,  # type: ignore[arg-type]
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo", timeout_s=config.worker_timeout_seconds),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.use_gpu else {}),
        ),
        # Ray's own restarts would keep the attempt's name, and repeat errors that no restart mends.
        run_config=ray.train.RunConfig(
            name=job.attempt,
            storage_path=_ray_storage(job.output),
            failure_config=ray.train.FailureConfig(max_failures=0, max_preemption_failures=0),
        ),
    )
    with watched(job.pulse), _dead_after(config.worker_timeout_seconds):
        trainer.fit()


@contextlib.contextmanager
def _dead_after(seconds: float) -> Iterator[None]:
    """Let Ray Train give up a worker that does not answer for so long, even when no other waits for it.

    Its own limit is ten minutes, and can be set by the environment of the driver alone.
    """
    before = os.environ.get(HEALTH_CHECK_TIMEOUT)
    os.environ[HEALTH_CHECK_TIMEOUT] = before or str(seconds)
    try:
        yield
    finally:
        if before is None:
            del os.environ[HEALTH_CHECK_TIMEOUT]


def _settle(job: WorkerJob, last: Checkpoint) -> None:
    """Make up for what a killed run left undone: metrics that MLflow did not confirm, evaluations, and the ledger.

    Raises:
        TrainingStoppedError: an evaluation finds that the model has collapsed.
    """
    if job.tracker and (pending := last.manifest.state.get("pending_metrics")):
        MetricLog(job.tracker, pending=pending).close(FLUSH_SECONDS)
    if job.config.evaluate_every:
        evaluations = Evaluations(set())
        for missing in restore.not_evaluated(job):
            evaluations.start(missing)
        try:
            evaluations.poll(EVALUATION_SECONDS)
        except CollapseError as error:
            raise TrainingStoppedError(f"{error} The last checkpoint is {last.uri}.") from None
    if job.tracker:
        _list_checkpoints(job, job.tracker)
    _write_ledger(job, last)


def _list_checkpoints(job: WorkerJob, tracker: RunHandle) -> None:
    """A row of MLflow's model list for each checkpoint that was kept and evaluated, so that the list ranks them."""
    for kept in checkpoint.candidates(job.output, job.identity):
        if metrics := retention.read_evaluation(kept.uri):
            step, params = kept.manifest.step, {"zero_stage": job.config.zero_stage, "seed": job.config.seed}
            log_checkpoint_model(
                tracker, name=f"step-{step:08d}", step=step, uri=kept.uri, metrics=metrics, params=params
            )


def _write_ledger(job: WorkerJob, last: Checkpoint) -> None:
    """List the rows that the training could not use: table and row number, and the reason."""
    rows, plan = last.manifest.state.get("quarantined", []), job.plan
    ledger = []
    for row, reason in rows:
        number = bisect.bisect_right(plan.first_rows, row) - 1
        place = f"{plan.sources[number].uri}#{row - plan.first_rows[number]}"
        ledger.append(BadSample(source_uri=place, sample_id=None, reason=reason))
    write_quarantine(job.output, ledger)
    if ledger:
        logger.warning("%d of %d rows were unusable: %s/quarantine.parquet", len(rows), plan.num_samples, job.output)


def _causes(error: BaseException) -> list[BaseException]:
    """The workers' own errors."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    return [getattr(failure, "cause", None) or failure for failure in failures]


def _is_final(error: BaseException) -> bool:
    return any(isinstance(cause, FINAL) and not isinstance(cause, TrackingError) for cause in _causes(error))


def _reason(error: BaseException) -> str:
    """The most telling error in one line: a verdict before the errors that followed from it."""
    causes = sorted(_causes(error), key=lambda cause: not isinstance(cause, FINAL))
    return f"{type(causes[0]).__name__}: {' '.join(str(causes[0]).split())[:600]}"


def _ray_storage(output: str) -> Any:
    """Where Ray Train keeps its own bookkeeping."""
    path = storage.join(output, "ray")
    return path if storage.is_s3(output) else storage.filesystem(path)[1]
