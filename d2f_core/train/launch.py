"""Start a training on the cluster, restart it after failures, and report why when it cannot continue."""

import bisect
import contextlib
import functools
import itertools
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer

from d2f_core import storage
from d2f_core.data.quarantine import BadSample, write_quarantine
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.ray_internals import HEALTH_CHECK_TIMEOUT
from d2f_core.resources import Reservation, handed_to_group
from d2f_core.retry import UnreachableError
from d2f_core.tracking import RunHandle, log_checkpoint_model
from d2f_core.tracking.metric_log import MetricLog
from d2f_core.train import checkpoint, restore, retention
from d2f_core.train.checkpoint import Checkpoint
from d2f_core.train.config import TrainConfig
from d2f_core.train.evaluation import CollapseError
from d2f_core.train.evaluation_queue import EvaluationsBeside
from d2f_core.train.heartbeat import ask, start_pulse, watched
from d2f_core.train.interruption import Termination, terminable, terminated
from d2f_core.train.quarantine import quarantined_rows
from d2f_core.train.resources import fitting_workers, worker_bundle, worker_memory
from d2f_core.train.restarts import Restarts, causes, reason
from d2f_core.train.task import BuildTask
from d2f_core.train.worker import run_worker
from d2f_core.train.worker_job import WorkerJob

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 120.0


class TrainingStoppedError(ValueError):
    """A training ended before its last step; the message says why, and from where it can be resumed."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A training that has made its last step."""

    last: Checkpoint
    owed: tuple[int, ...]
    """Steps whose evaluation was due and is missing."""


def run_training(
    *,
    config: TrainConfig,
    build_task: BuildTask,
    plan: StreamPlan,
    output: str,
    identity: str,
    tracker: RunHandle | None = None,
    worker_bytes: Callable[[TrainConfig], int] = lambda _: 0,
) -> Trained:
    """Train to the last step, from the newest whole checkpoint under `output` if there is one.

    Args:
        identity: hash of everything that a checkpoint and this run must have in common.
        worker_bytes: estimate of the host's memory that a worker takes when `num_workers` run; 0: not known.

    Returns:
        The last checkpoint, and the steps whose evaluation was due and failed or did not end in time; the same call
        again makes them up.

    Raises:
        InsufficientResourcesError: the cluster is too small.
        CheckpointError: `output` holds a run of another configuration.
        TrainingStoppedError: the training failed more than `max_failures` times in a row without a new checkpoint, or
            with an error that a restart cannot fix.
        SystemExit: SIGTERM ended it, after a checkpoint.
    """
    job = WorkerJob(config=config, build_task=build_task, plan=plan, output=output, identity=identity, tracker=tracker)
    restarts, again = Restarts(config.max_failures), False
    if config.precision_warning:
        logger.warning("%s", config.precision_warning)
    with terminable(functools.partial(_killed, tracker)) as termination:
        while True:
            held = None
            try:
                if last := _complete(config, output, identity):
                    return Trained(last=last, owed=_settle(job, last))
                held = fitting_workers(config, again=again)
                again = True
                termination.pulse = start_pulse()
                now = replace(config, num_workers=held.count, min_workers=0)
                memory = worker_memory(now, held, worker_bytes(now))
                _attempt(replace(job, config=now, attempt=uuid.uuid4().hex[:8], pulse=termination.pulse), held, memory)
            except (ray.train.TrainingFailedError, RayError, UnreachableError) as error:
                if termination.asked:
                    logger.warning("the attempt ended: %s", reason(error))
                else:
                    _after_failure(job, error, termination.pulse, restarts)
            finally:
                if held is not None:
                    held.release()
                _end_pulse(termination)
            if termination.asked:
                raise terminated(output, identity)


def _killed(tracker: RunHandle | None) -> None:
    if tracker:
        tracker.end_early("KILLED", "SIGTERM before any worker trained")


def _end_pulse(termination: Termination) -> None:
    pulse, termination.pulse = termination.pulse, None
    if pulse is not None:
        ray.kill(pulse)


def _after_failure(job: WorkerJob, error: BaseException, pulse: Any, restarts: Restarts) -> None:
    """Log why an attempt ended, and from where the next one resumes.

    Args:
        pulse: None when no worker was asked for: a server that the driver itself needs was away.

    Raises:
        TrainingStoppedError: no further attempt is allowed.
    """
    there = _checkpoints_there(job)
    step = restarts.step if there is None else there[0].manifest.step if there else 0
    why_not = restarts.add(error, pulse, step)
    there = there or []
    collapsed = [cause for cause in causes(error) if isinstance(cause, CollapseError)]
    if collapsed:
        raise TrainingStoppedError(f"{reason(error)} {_last_good(job, there, collapsed[0])}") from None
    place = f"The last good checkpoint is {there[0].uri}." if there else "No checkpoint is there, or none can be seen."
    if why_not:
        raise TrainingStoppedError(f"{reason(error)} {why_not} {place} The same command again resumes.") from None
    count = "for a node was announced to go" if restarts.excused else f"failure {restarts.in_a_row} in a row"
    workers = "; ".join(ask(pulse.report, default=[])) if pulse is not None else "in the driver"
    logger.warning("the attempt ended, %s: %s (%s). Starting again. %s", count, reason(error), workers, place)


def _checkpoints_there(job: WorkerJob) -> list[Checkpoint] | None:
    """Newest first; None when the storage cannot be reached, which must not end what only failed."""
    try:
        return checkpoint.candidates(job.output, job.identity)
    except UnreachableError as error:
        logger.warning("%s", error)
        return None


def _last_good(job: WorkerJob, there: list[Checkpoint], collapsed: CollapseError) -> str:
    """Sentence that names the newest good checkpoint before the collapse; `there` are the checkpoints, newest first."""
    good = retention.last_good(one for one in there if one.manifest.step < collapsed.step)
    if good is None:
        return "No checkpoint before it was evaluated and kept."
    return (
        f"The last good checkpoint is {good.uri}: python -m pipelines.export checkpoint --run {job.output} "
        f"--step {good.manifest.step} --output PLACE makes a model of it."
    )


def _complete(config: TrainConfig, output: str, identity: str) -> Checkpoint | None:
    found = checkpoint.candidates(output, identity)
    if found and found[0].manifest.step >= config.num_steps:
        logger.info("training is complete at step %d: %s", found[0].manifest.step, found[0].uri)
        return found[0]
    return None


def _attempt(job: WorkerJob, held: Reservation, memory: int) -> None:
    config, worker = job.config, worker_bundle(job.config, memory)
    trainer = TorchTrainer(
        # Not as `train_loop_config`: Ray's controller would unpickle it, and import everything that a worker needs.
        functools.partial(run_worker, job),
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo", timeout_s=config.worker_timeout_seconds),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker=worker,
        ),
        # Ray's own restarts would reuse the attempt's name, and retry errors that no restart can fix.
        run_config=ray.train.RunConfig(
            name=job.attempt,
            storage_path=_ray_storage(job.output),
            # Without a limit of its own, a group that cannot start is tried again every minute for ever.
            failure_config=ray.train.FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
        ),
    )
    with (
        watched(job.pulse),
        _dead_after(config.worker_timeout_seconds),
        handed_to_group(held, [worker] * config.num_workers),
    ):
        trainer.fit()


@contextlib.contextmanager
def _dead_after(seconds: float) -> Iterator[None]:
    """Make Ray Train give up a worker that has not answered for `seconds`, even if no other worker waits for it.

    Ray's default is ten minutes, and can only be changed by an environment variable of the driver.
    """
    before = os.environ.get(HEALTH_CHECK_TIMEOUT)
    os.environ[HEALTH_CHECK_TIMEOUT] = before or str(seconds)
    try:
        yield
    finally:
        if before is None:
            del os.environ[HEALTH_CHECK_TIMEOUT]


def _settle(job: WorkerJob, last: Checkpoint) -> tuple[int, ...]:
    """Make up for what a killed run left undone: metrics that MLflow did not confirm, evaluations, and the ledger.

    Returns:
        Steps whose evaluation is missing all the same.

    Raises:
        TrainingStoppedError: an evaluation finds that the model has collapsed.
    """
    if job.tracker and (pending := last.manifest.state.get("pending_metrics")):
        MetricLog(job.tracker, pending=pending).close(FLUSH_SECONDS)
    if job.config.evaluate_every:
        evaluations = EvaluationsBeside(set())
        for missing in restore.not_evaluated(job):
            evaluations.start(missing)
        try:
            evaluations.poll(job.config.evaluation_seconds)
        except CollapseError as error:
            there = checkpoint.candidates(job.output, job.identity)
            raise TrainingStoppedError(f"{error} {_last_good(job, there, error)}") from None
    if job.tracker:
        _list_checkpoints(job, job.tracker)
    _write_ledger(job, last)
    storage.remove_tree(_ray_directory(job.output))
    return tuple(one.step for one in restore.not_evaluated(job)) if job.config.evaluate_every else ()


def _list_checkpoints(job: WorkerJob, tracker: RunHandle) -> None:
    """Add a row to MLflow's model list for each kept and evaluated checkpoint, so that the list can rank them."""
    for kept in checkpoint.candidates(job.output, job.identity):
        if metrics := retention.read_evaluation(kept.uri):
            step, params = kept.manifest.step, {"zero_stage": job.config.zero_stage, "seed": job.config.seed}
            log_checkpoint_model(
                tracker, name=f"step-{step:08d}", step=step, uri=kept.uri, metrics=metrics, params=params
            )


def _write_ledger(job: WorkerJob, last: Checkpoint) -> None:
    """Write the ledger of rows that the training could not use: table, row number and reason."""
    plan = job.plan

    def entry(row: int, why: str) -> BadSample:
        number = bisect.bisect_right(plan.first_rows, row) - 1
        place = f"{plan.sources[number].uri}#{row - plan.first_rows[number]}"
        return BadSample(source_uri=place, sample_id=None, reason=why)

    count = write_quarantine(job.output, itertools.starmap(entry, quarantined_rows(last)))
    if count:
        logger.warning("%d of %d rows were unusable: %s/quarantine.parquet", count, plan.num_samples, job.output)


def _ray_directory(output: str) -> str:
    """Directory of Ray Train's own state, one subdirectory per attempt; it is never used to resume."""
    return storage.join(output, "ray")


def _ray_storage(output: str) -> Any:
    """The same directory in the form that Ray accepts."""
    path = _ray_directory(output)
    return path if storage.is_s3(output) else storage.filesystem(path)[1]
