"""Start a training on the cluster, restart it after failures, and say what is missing when it cannot go on."""

import bisect
import contextlib
import functools
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer

from d2f_core import storage
from d2f_core.data.quarantine import BadSample, write_quarantine
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.resources import Reservation, handed_to_group
from d2f_core.tracking import RunHandle, log_checkpoint_model
from d2f_core.tracking.metric_log import MetricLog
from d2f_core.train import checkpoint, restore, retention
from d2f_core.train.checkpoint import Checkpoint
from d2f_core.train.config import TrainConfig
from d2f_core.train.evaluation import CollapseError, Evaluations
from d2f_core.train.heartbeat import ask, start_pulse, watched
from d2f_core.train.interruption import terminable, terminated
from d2f_core.train.resources import fitting_workers, worker_bundle
from d2f_core.train.restarts import Restarts, causes, reason
from d2f_core.train.task import BuildTask
from d2f_core.train.worker import EVALUATION_SECONDS, run_worker
from d2f_core.train.worker_job import WorkerJob

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 120.0
HEALTH_CHECK_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"


class TrainingStoppedError(ValueError):
    """A training that ended before its last step: why, and from where it goes on."""


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
        InsufficientResourcesError: the cluster is too small.
        CheckpointError: `output` holds a run of another configuration.
        TrainingStoppedError: it failed more than `max_failures` times in a row without a new checkpoint, or of
            something that a restart cannot mend.
        SystemExit: SIGTERM ended it, after a checkpoint.
    """
    job = WorkerJob(config=config, build_task=build_task, plan=plan, output=output, identity=identity, tracker=tracker)
    restarts, again = Restarts(config.max_failures), False
    with terminable() as termination:
        while not (last := _complete(config, output, identity)):
            held = fitting_workers(config, again=again)
            again = True
            termination.pulse = pulse = start_pulse()
            try:
                now = replace(config, num_workers=held.count, min_workers=0)
                _attempt(replace(job, config=now, attempt=uuid.uuid4().hex[:8], pulse=pulse), held)
            except (ray.train.TrainingFailedError, RayError) as error:
                if termination.asked:
                    logger.warning("the attempt ended: %s", reason(error))
                else:
                    _after_failure(job, error, pulse, restarts)
            finally:
                termination.pulse = None
                held.release()
                ray.kill(pulse)
            if termination.asked:
                raise terminated(output, identity)
    _settle(job, last)
    return last


def _after_failure(job: WorkerJob, error: BaseException, pulse: Any, restarts: Restarts) -> None:
    """Say why an attempt ended, and from where the next one goes on.

    Raises:
        TrainingStoppedError: there must not be another attempt.
    """
    there = checkpoint.candidates(job.output, job.identity)
    why_not = restarts.add(error, pulse, there[0].manifest.step if there else 0)
    collapsed = [cause for cause in causes(error) if isinstance(cause, CollapseError)]
    if collapsed:
        raise TrainingStoppedError(f"{reason(error)} {_last_good(job, there, collapsed[0])}") from None
    place = f"The last good checkpoint is {there[0].uri}." if there else "There is no checkpoint yet."
    if why_not:
        raise TrainingStoppedError(f"{reason(error)} {why_not} {place} The same command again resumes.") from None
    count = "for a node was announced to go" if restarts.excused else f"failure {restarts.in_a_row} in a row"
    workers = "; ".join(ask(pulse.report, default=[]))
    logger.warning("the attempt ended, %s: %s (%s). Starting again. %s", count, reason(error), workers, place)


def _last_good(job: WorkerJob, there: list[Checkpoint], collapsed: CollapseError) -> str:
    """Which of the checkpoints that are there, newest first, holds the model before it collapsed."""
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


def _attempt(job: WorkerJob, held: Reservation) -> None:
    config, worker = job.config, worker_bundle(job.config)
    trainer = TorchTrainer(
        # Not as `train_loop_config`: Ray's controller would unpickle that, and import all that a worker needs.
        functools.partial(run_worker, job),
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo", timeout_s=config.worker_timeout_seconds),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker=worker,
        ),
        # Ray's own restarts would keep the attempt's name, and repeat errors that no restart mends.
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
            there = checkpoint.candidates(job.output, job.identity)
            raise TrainingStoppedError(f"{error} {_last_good(job, there, error)}") from None
    if job.tracker:
        _list_checkpoints(job, job.tracker)
    _write_ledger(job, last)
    storage.remove_tree(_ray_directory(job.output))


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
    for row, why in rows:
        number = bisect.bisect_right(plan.first_rows, row) - 1
        place = f"{plan.sources[number].uri}#{row - plan.first_rows[number]}"
        ledger.append(BadSample(source_uri=place, sample_id=None, reason=why))
    write_quarantine(job.output, ledger)
    if ledger:
        logger.warning("%d of %d rows were unusable: %s/quarantine.parquet", len(rows), plan.num_samples, job.output)


def _ray_directory(output: str) -> str:
    """Ray Train's own bookkeeping, a directory per attempt; nobody resumes from it."""
    return storage.join(output, "ray")


def _ray_storage(output: str) -> Any:
    """The same as Ray takes it."""
    path = _ray_directory(output)
    return path if storage.is_s3(output) else storage.filesystem(path)[1]
