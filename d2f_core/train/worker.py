"""The training loop of every Ray Train worker: build, restore, step, log, save."""

import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from d2f_core.data.stream import micro_batches, worker_shard
from d2f_core.tracking.metric_log import MetricLog
from d2f_core.train import restore, zero
from d2f_core.train.checkpoint import Checkpoint
from d2f_core.train.checkpoint_writer import CheckpointWriter
from d2f_core.train.config import TrainConfig
from d2f_core.train.determinism import use_deterministic_algorithms
from d2f_core.train.evaluation import evaluation_due
from d2f_core.train.evaluation_queue import EvaluationQueue, EvaluationsBeside, EvaluationsBetweenSteps, Pause
from d2f_core.train.heartbeat import Heartbeat
from d2f_core.train.interruption import PAUSE, Interruptions
from d2f_core.train.metrics import Window, log_progress
from d2f_core.train.quarantine import TrainingQuarantine
from d2f_core.train.steps import StepResult, train_steps
from d2f_core.train.task import Task
from d2f_core.train.worker_job import WorkerJob
from d2f_core.train.worker_state import Worker

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 120.0


class Training:
    """One worker's loop around the steps; only the first worker logs, starts evaluations and reports errors."""

    def __init__(
        self, job: WorkerJob, worker: Worker, task: Task, heartbeat: Heartbeat, found: Checkpoint | None
    ) -> None:
        first_step, state = (found.manifest.step, found.manifest.state) if found else (0, {})
        self.job, self.worker, self.config, self.task = job, worker, job.config, task
        self.first = worker.rank == 0
        self.heartbeat = heartbeat
        heartbeat.begin(first_step)
        if self.first:
            logger.info(
                "training from step %d to %d on %d workers", first_step, self.config.num_steps, worker.num_workers
            )
        self.interruptions = Interruptions(self.heartbeat, first=self.first)
        self.writer = CheckpointWriter(job.output, job.attempt, worker.rank, worker.num_workers, job.config.retention)
        self.evaluations, self.pause = self._evaluations(), Pause(job.attempt, first=self.first)
        self.quarantine = TrainingQuarantine.restored(found, job.plan, job.config.max_quarantined_share)
        pending = state.get("pending_metrics", [])
        self.log = MetricLog(job.tracker, pending=pending) if self.first and job.tracker else None
        self.evaluated = first_step
        self.consumed = int(state.get("consumed", 0)) if self.first else 0
        """Sum of `consumed_digest` over all samples that the run has used, over all workers."""
        self.window = Window()

    def _evaluations(self) -> EvaluationQueue:
        if self.config.evaluation_place != "workers":
            return EvaluationsBeside(self.writer.protected)
        return EvaluationsBetweenSteps(
            self.writer.protected,
            self.task,
            str(self.worker.engine.device),
            whole=self.config.zero_stage < 3,
            seconds=self.config.evaluation_seconds,
            stop_asked=lambda: self.heartbeat.stop_asked,
        )

    def signal(self) -> int:
        """What this worker says to all with its step."""
        return self.interruptions.signal(pause=self.evaluations.waits_for_pause)

    def after(self, result: StepResult) -> None:
        """Everything that follows an optimizer step: averages, metrics, checkpoint, evaluation."""
        step, config = result.step, self.config
        self.heartbeat.step = step
        if config.ema.decay:
            self.worker.update_averages(step)
        self.window.add(result, config.global_batch_size)
        self.quarantine.add(result.unusable)
        self.consumed += result.consumed
        last = step == config.num_steps
        if step % config.log_every == 0 or last:
            self.metrics(step)
        out_of_turn = self.interruptions.agreed(result.signals, step)
        if step % config.checkpoint_every == 0 or last or out_of_turn:
            self.save(step)
        if result.signals == PAUSE:
            self.evaluate_between_steps()
        self.poll_evaluations()
        self.heartbeat.doing("waiting for rows")

    def metrics(self, step: int) -> None:
        """Copy the metrics of the last steps from the device, and log them."""
        summary = self.window.summary()
        self.window = Window()
        loss = torch.tensor([summary["loss"]], device=self.worker.engine.device)
        dist.all_reduce(loss)
        summary["loss"] = float(loss) / self.worker.num_workers
        summary["learning_rate"] = self.config.learning_rate_at(step - 1)
        norm = self.worker.engine.get_global_grad_norm()
        if norm is not None:
            summary["grad_norm"] = float(norm)
        summary["unusable_rows"] = float(self.quarantine.exchange(self.worker.engine.device))
        if self.first:
            log_progress(step, self.config.num_steps, summary, self.config.global_batch_size)
            if self.log:
                self.log.log(step, summary)

    def save(self, step: int) -> None:
        """Start a checkpoint in the background; every worker must call this."""
        self.heartbeat.doing("saving")
        began = time.perf_counter()
        self.quarantine.exchange(self.worker.engine.device)
        parts: list[int] = [0] * self.worker.num_workers
        dist.all_gather_object(parts, self.consumed)
        unusable, files = self.quarantine.stored() if self.first else ({}, {})
        state = {"consumed": str(sum(parts) % 2**64), "engine": zero.engine_state(self.worker.engine), **unusable}
        if self.log:
            state["pending_metrics"] = self.log.pending()
        self.writer.save(
            step,
            samples=step * self.config.global_batch_size,
            identity=self.job.identity,
            tensors=self.worker.share(),
            state=state,
            files=files,
        )
        if self.first:
            logger.info("step %d  checkpoint under way (%.1f s waited)", step, time.perf_counter() - began)

    def poll_evaluations(self) -> None:
        """Start the evaluation of a newly completed checkpoint, and collect finished evaluations.

        Raises:
            CollapseError: an evaluation found a collapsed model.
        """
        self.writer.poll()
        if not self.first or self.task.evaluate is None:
            return
        if self.writer.last_complete and self.writer.last_complete[0] > self.evaluated:
            self.evaluated, uri = self.writer.last_complete
            if evaluation_due(self.config, self.evaluated):
                self.evaluations.start(self.job.evaluation(self.evaluated, uri))
        self.evaluations.poll()

    def evaluate_between_steps(self, *, untrained: bool = False) -> None:
        """Let the first worker evaluate one checkpoint while the others wait; every worker must call this.

        Args:
            untrained: no step was made yet.
        """
        self.heartbeat.doing("evaluating" if self.first else "waiting for the evaluation")
        with self.pause.until_first_is_done():
            if self.evaluations.waits_for_pause:
                self.evaluations.run_first(untrained=untrained)

    def evaluate_what_is_missing(self) -> None:
        """Start the evaluations that are due but not done, those of earlier attempts included."""
        if self.first and self.task.evaluate and self.config.evaluate_every:
            for missing in restore.not_evaluated(self.job):
                self.evaluations.start(missing)

    def finish(self) -> None:
        """Wait for the last checkpoint, its evaluation and the metrics; after a stop, only for the checkpoint."""
        self.heartbeat.doing("finishing the last checkpoint")
        self.writer.wait()
        if not self.interruptions.stopping:
            self.evaluate_what_is_missing()
            self.evaluations.poll(self.config.evaluation_seconds)
        self.writer.close()
        # The checkpoint of a stopped training holds the metrics that MLflow has not confirmed.
        if self.log and not self.interruptions.stopping:
            self.log.close(FLUSH_SECONDS)
        self.heartbeat.stop()


def _show_log() -> None:
    """Write the first worker's log lines to the job's log; Ray's own handlers would drop them."""
    package = logging.getLogger("d2f_core")
    if ray.train.get_context().get_world_rank() == 0 and not package.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False


def _prepare_process(config: TrainConfig, num_workers: int) -> None:
    """What has to be set before anything is computed. DeepSpeed's CPU AdamW uses torch's threads.

    Ray tells OpenMP to use as many threads as the worker reserves CPUs, which by default is one.
    """
    if config.deterministic:
        use_deterministic_algorithms()
    if not config.use_gpu:
        cores = os.cpu_count() or 1
        torch.set_num_threads(config.threads_per_worker or max(1, cores // num_workers))
    elif config.offload != "none":
        torch.set_num_threads(config.threads_per_worker or max(1, int(config.cpus_per_worker)))


def run_worker(job: WorkerJob) -> None:
    """Ray Train's `train_loop_per_worker`."""
    _show_log()
    config, context = job.config, ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    _prepare_process(config, num_workers)
    heartbeat = Heartbeat(job.pulse, rank)
    heartbeat.doing("building the model")
    device = str(ray.train.torch.get_device())
    task = job.build_task(device)
    heartbeat.doing("reading the checkpoint")
    found = restore.choose(job.output, job.identity, task.module, device)
    first_step = found.manifest.step if found else 0
    if config.activation_checkpointing:
        zero.enable_activation_checkpointing(task.module)
    # Before the engine is built: both take seconds, and the first rows come from processes that have to start.
    rows: Iterator[pa.Table] = micro_batches(
        worker_shard(job.plan, rank=rank, num_workers=num_workers, first_step=first_step)
    )
    worker = Worker(config, zero.build_engine(task.module, config, num_workers), rank, num_workers)
    if found:
        heartbeat.doing("restoring")
        first = next(rows)
        restore.put_back(worker, task, found, first)
        rows = itertools.chain([first], rows)
    elif config.ema.decay:
        worker.update_averages(0)
    training = Training(job, worker, task, heartbeat, found)
    training.evaluate_what_is_missing()
    if not first_step and config.evaluate_every and config.evaluation_place == "workers":
        training.evaluate_between_steps(untrained=True)
    _run_steps(training, task, rows, first_step)
    training.finish()


def _run_steps(training: Training, task: Task, rows: Any, first_step: int) -> None:
    config, worker = training.config, training.worker

    def to_batch(table: pa.Table) -> Any:
        training.heartbeat.doing("computing")
        return task.to_batch(table)

    training.heartbeat.doing("waiting for rows")
    for result in train_steps(
        worker.engine,
        rows,
        to_batch,
        task.loss_fn,
        accumulation=training.job.plan.per_step(worker.num_workers),
        first_step=first_step,
        before_step=lambda step: zero.set_learning_rate(worker.engine, config.learning_rate_at(step)),
        signal=training.signal,
    ):
        training.after(result)
        if training.interruptions.stopping:
            return
