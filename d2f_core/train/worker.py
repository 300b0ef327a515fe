"""What every Ray Train worker runs: build, restore, step, log, save."""

import itertools
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from d2f_core.data.stream import StreamPlan, micro_batches
from d2f_core.model import ema
from d2f_core.model.artifact import load_weights
from d2f_core.train import checkpoint, zero
from d2f_core.train.config import TrainConfig
from d2f_core.train.metrics import Window, log_progress
from d2f_core.train.steps import train_steps
from d2f_core.train.task import BuildTask, Evaluation, Task, Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """All that a worker is given."""

    config: TrainConfig
    build_task: BuildTask
    plan: StreamPlan
    output: str
    """Where checkpoints go."""
    identity: str
    """Hash of what must not change within a run."""
    attempt: str
    """Names this attempt's checkpoint directories."""
    resume_from: str | None = None
    """Checkpoint to go on from; the plan starts at its step."""
    tracker: Tracker | None = None


@dataclass
class Worker:
    """One worker's state while it trains."""

    job: WorkerJob
    task: Task
    engine: Any
    rank: int
    num_workers: int
    averages: dict[str, Tensor] = field(default_factory=dict)
    """EMA of this worker's share of the parameters, fp32."""

    @property
    def config(self) -> TrainConfig:
        return self.job.config

    def owner(self, index: int) -> int:
        return index % self.num_workers

    def update_averages(self, step: int) -> None:
        decay = self.config.ema.decay_at(step)
        for index, (name, parameter) in enumerate(zero.trained_parameters(self.engine).items()):
            weight = zero.read_weight(self.engine, parameter)
            if self.owner(index) != self.rank:
                continue
            if name not in self.averages:
                self.averages[name] = weight.clone()
            else:
                ema.update(self.averages[name], weight, decay)

    def evaluation_weights(self) -> dict[str, Tensor]:
        """The averages of all workers; empty when none are kept."""
        if not self.config.ema.decay:
            return {}
        weights = {}
        for index, (name, parameter) in enumerate(zero.trained_parameters(self.engine).items()):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            value = (
                self.averages[name] if self.owner(index) == self.rank else torch.empty(shape, device=self.engine.device)
            )
            dist.broadcast(value, src=self.owner(index))
            weights[name] = value
        return weights

    def evaluate(self, step: int) -> dict[str, float]:
        """Run the task's evaluation with the averaged weights; metrics and a grid go to the tracker."""
        if self.task.evaluate is None:
            return {}
        began = time.perf_counter()
        self.engine.eval()
        with torch.no_grad(), zero.swapped_weights(self.engine, self.evaluation_weights()):
            share = self.task.evaluate(self.engine, self.rank, self.num_workers)
        self.engine.train()
        shares: list[Evaluation | None] = [None] * self.num_workers
        dist.gather_object(share, shares if self.rank == 0 else None)
        if self.rank:
            return {}
        metrics = merge([item for item in shares if item is not None])
        images = [image for item in shares if item is not None for image in item.images]
        if self.job.tracker:
            self.job.tracker.log_metrics(step, metrics)
            if images and self.task.make_grid:
                self.job.tracker.log_image("samples", self.task.make_grid(images), step)
        logger.info("step %d  evaluation %s  (%.1f s)", step, metrics, time.perf_counter() - began)
        return metrics

    def save(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a checkpoint; every worker must call it."""
        uri = storage_uri(self.job, step)
        tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in checkpoint.KINDS}
        tensors["ema"] = self.averages
        for index, (name, parameter) in enumerate(zero.trained_parameters(self.engine).items()):
            whole = {"weights": zero.read_weight(self.engine, parameter)}
            whole |= {moment: zero.read_moment(self.engine, parameter, moment) for moment in zero.MOMENTS}
            if self.owner(index) == self.rank:
                for kind, tensor in whole.items():
                    tensors[kind][name] = tensor
        files = checkpoint.write_share(uri, self.rank, tensors)
        shares: list[list[checkpoint.CheckpointFile] | None] = [None] * self.num_workers
        dist.all_gather_object(shares, files)
        if self.rank == 0:
            manifest = checkpoint.CheckpointManifest(
                step=step,
                samples=step * self.config.global_batch_size,
                identity=self.job.identity,
                num_workers=self.num_workers,
                files=tuple(file for share in shares for file in share or ()),
            )
            checkpoint.write_manifest(uri, manifest)
            checkpoint.remove_old(self.job.output, self.config.keep_checkpoints)
            logger.info("step %d  checkpoint %s", step, uri)
        dist.barrier()
        ray.train.report({"step": step, "checkpoint": uri, **metrics})


def storage_uri(job: WorkerJob, step: int) -> str:
    return f"{checkpoint.checkpoints_uri(job.output)}/{checkpoint.directory_name(step, job.attempt)}"


def merge(shares: list[Evaluation]) -> dict[str, float]:
    """Means over all workers' shares."""
    names = sorted({name for share in shares for name in share.sums})
    totals = {name: [share.sums[name] for share in shares if name in share.sums] for name in names}
    return {name: sum(s for s, _ in parts) / max(1, sum(n for _, n in parts)) for name, parts in totals.items()}


def _show_log() -> None:
    """Plain lines in the job's log, from the first worker; Ray's own handlers would drop them."""
    package = logging.getLogger("d2f_core")
    if ray.train.get_context().get_world_rank() == 0 and not package.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False


def _set_threads(config: TrainConfig) -> None:
    if not config.use_gpu:
        cores = os.cpu_count() or 1
        torch.set_num_threads(config.threads_per_worker or max(1, cores // config.num_workers))


def _start(job: WorkerJob) -> Worker:
    """Build the task and the engine; the weights are the checkpoint's when there is one."""
    context = ray.train.get_context()
    task = job.build_task(str(ray.train.torch.get_device()))
    if job.resume_from:
        weights = checkpoint.read_tensors(job.resume_from, checkpoint.read_manifest(job.resume_from), "weights")
        load_weights(task.module, weights)
    engine = zero.build_engine(task.module, job.config, context.get_world_size())
    return Worker(job, task, engine, context.get_world_rank(), context.get_world_size())


def _restore(worker: Worker, uri: str, first_rows: Any) -> None:
    """Put moments and averages back; the weights are there already."""
    manifest = checkpoint.read_manifest(uri)
    by_moment = {moment: checkpoint.read_tensors(uri, manifest, moment) for moment in zero.MOMENTS}
    names = list(zero.trained_parameters(worker.engine))
    moments = {name: {moment: by_moment[moment][name] for moment in zero.MOMENTS} for name in names}
    batch = worker.task.to_batch(first_rows)
    zero.restore_moments(
        worker.engine, moments, manifest.step, lambda: worker.task.loss_fn(worker.engine, batch).mean()
    )
    averages = checkpoint.read_tensors(uri, manifest, "ema")
    worker.averages = {
        name: averages[name].to(worker.engine.device)
        for index, name in enumerate(names)
        if worker.owner(index) == worker.rank and name in averages
    }
    logger.info("resumed from %s", uri)


def run_worker(job: WorkerJob) -> None:
    """Ray Train's `train_loop_per_worker`."""
    _show_log()
    config = job.config
    _set_threads(config)
    worker = _start(job)
    metrics: dict[str, float] = {}
    rows = micro_batches(ray.train.get_dataset_shard("train"), config.micro_batch_size)
    if job.resume_from:
        first = next(rows)
        _restore(worker, job.resume_from, first)
        rows = itertools.chain([first], rows)
    else:
        if config.ema.decay:
            worker.update_averages(0)
        if config.evaluate_every:
            metrics = worker.evaluate(0)
    accumulation = config.global_batch_size // (config.micro_batch_size * worker.num_workers)
    window = Window()
    for result in train_steps(
        worker.engine,
        rows,
        worker.task.to_batch,
        worker.task.loss_fn,
        accumulation=accumulation,
        first_step=job.plan.first_step,
        before_step=lambda step: zero.set_learning_rate(worker.engine, config.learning_rate_at(step)),
    ):
        step = result.step
        if config.ema.decay:
            worker.update_averages(step)
        window.losses.append(result.loss)
        window.samples += config.global_batch_size
        window.waited += result.waited
        if step % config.log_every == 0 or step == config.num_steps:
            metrics = metrics | _log(worker, step, window)
            window = Window()
        last = step == config.num_steps
        if config.evaluate_every and (step % config.evaluate_every == 0 or last):
            metrics = metrics | worker.evaluate(step)
            window.began = time.perf_counter() if not window.samples else window.began
        if step % config.checkpoint_every == 0 or last:
            worker.save(step, metrics)
            window.began = time.perf_counter() if not window.samples else window.began


def _log(worker: Worker, step: int, window: Window) -> dict[str, float]:
    summary = window.summary()
    loss = torch.tensor([summary["loss"]], device=worker.engine.device)
    dist.all_reduce(loss)
    summary["loss"] = float(loss) / worker.num_workers
    summary["learning_rate"] = worker.config.learning_rate_at(step - 1)
    norm = worker.engine.get_global_grad_norm()
    if norm is not None:
        summary["grad_norm"] = float(norm)
    if worker.rank == 0:
        log_progress(step, worker.config.num_steps, summary, worker.config.global_batch_size)
        if worker.job.tracker:
            worker.job.tracker.log_metrics(step, summary)
    return summary
