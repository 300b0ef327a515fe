"""Start a training on the cluster, restart it after failures, and say what is missing when it cannot go on."""

import bisect
import logging
import time
import uuid
from dataclasses import replace
from typing import Any, cast

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer

from d2f_core import storage
from d2f_core.data.plan import StreamPlan
from d2f_core.data.quarantine import BadSample, write_quarantine
from d2f_core.data.table_reader import DamagedDataError
from d2f_core.storage import StorageError
from d2f_core.tracking import RunHandle, TrackingError
from d2f_core.tracking.metric_log import MetricLog
from d2f_core.train import checkpoint, restore
from d2f_core.train.checkpoint import Checkpoint, CheckpointError
from d2f_core.train.config import TrainConfig
from d2f_core.train.evaluation import CollapseError, Evaluations
from d2f_core.train.heartbeat import Pulse, ask, watched
from d2f_core.train.quarantine import QuarantineLimitError
from d2f_core.train.steps import NonFiniteLossError
from d2f_core.train.task import BuildTask
from d2f_core.train.worker import EVALUATION_SECONDS, WorkerJob, run_worker
from d2f_core.train.zero import NonFiniteGradientError

logger = logging.getLogger(__name__)

RESOURCE_WAIT_SECONDS = 60
FLUSH_SECONDS = 120.0

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


def check_resources(config: TrainConfig, *, wait_seconds: float) -> None:
    """Refuse a training that the cluster cannot hold.

    An autoscaling cluster may grow: nodes are given `wait_seconds` to come; then the error says what is missing.
    """
    needed = {"CPU": config.num_workers * (config.cpus_per_worker + 0.5) + 1}
    if config.use_gpu:
        needed["GPU"] = config.num_workers + config.evaluation_gpus
    deadline = time.monotonic() + wait_seconds
    while True:
        total = ray.cluster_resources()
        short = {name: amount for name, amount in needed.items() if total.get(name, 0) < amount}
        if not short:
            return
        if time.monotonic() >= deadline:
            has = ", ".join(f"{total.get(name, 0):g} {name}" for name in short)
            wants = ", ".join(f"{amount:g} {name}" for name, amount in short.items())
            raise NotEnoughResourcesError(
                f"num_workers={config.num_workers} needs {wants} (each worker, its reader and one evaluation), the "
                f"cluster has {has}. Lower --train.num-workers or --train.cpus-per-worker, or add nodes."
            )
        time.sleep(1)


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
    """
    job = WorkerJob(config=config, build_task=build_task, plan=plan, output=output, identity=identity, tracker=tracker)
    failures = 0
    while not (last := _complete(config, output, identity)):
        check_resources(config, wait_seconds=RESOURCE_WAIT_SECONDS)
        pulse: Any = cast(Any, Pulse).remote()
        try:
            _attempt(replace(job, attempt=uuid.uuid4().hex[:8], pulse=pulse))
        except (ray.train.TrainingFailedError, RayError) as error:
            failures += 1
            reason, final = _reason(error), _is_final(error)
            workers = "; ".join(ask(pulse.report, default=[]))
            there = checkpoint.candidates(output, identity)
            place = f"The last good checkpoint is {there[0].uri}." if there else "There is no checkpoint yet."
            if final or 0 <= config.max_failures < failures:
                tail = "" if final else f" That was failure {failures}, max_failures={config.max_failures}."
                raise TrainingStoppedError(f"{reason}{tail} {place} The same command again resumes.") from None
            logger.warning("the attempt ended: %s (%s). Restart %d. %s", reason, workers, failures, place)
        finally:
            ray.kill(pulse)
    _settle(job, last)
    return last


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
        run_config=ray.train.RunConfig(name=job.attempt, storage_path=_ray_storage(job.output)),
    )
    with watched(job.pulse):
        trainer.fit()


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
    _write_ledger(job, last)


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
