"""Start a training on the cluster, and say what is missing when it cannot start."""

import logging
import time
import uuid
from typing import Any

import ray
import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from d2f_core import storage
from d2f_core.data.order import SampleOrder
from d2f_core.data.stream import PlannedData, StreamPlan
from d2f_core.train import checkpoint
from d2f_core.train.config import TrainConfig
from d2f_core.train.task import BuildTask, Tracker
from d2f_core.train.worker import WorkerJob, run_worker

logger = logging.getLogger(__name__)

RESOURCE_WAIT_SECONDS = 60


class NotEnoughResourcesError(ValueError):
    """The cluster cannot hold the training that was asked for."""


def check_resources(config: TrainConfig, *, wait_seconds: float) -> None:
    """Refuse a training that the cluster cannot hold.

    An autoscaling cluster may grow: nodes are given `wait_seconds` to come; then the error says what is missing.
    """
    needed = {"CPU": config.num_workers * (config.cpus_per_worker + 0.5) + 1}
    if config.use_gpu:
        needed["GPU"] = config.num_workers
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
                f"num_workers={config.num_workers} needs {wants} (each worker, its reader and one reading task), the "
                f"cluster has {has}. Lower --train.num-workers or --train.cpus-per-worker, or add nodes."
            )
        time.sleep(1)


def run_training(
    *,
    config: TrainConfig,
    build_task: BuildTask,
    table: str,
    columns: tuple[str, ...],
    order: SampleOrder,
    output: str,
    identity: str,
    tracker: Tracker | None = None,
) -> tuple[str, checkpoint.CheckpointManifest]:
    """Train to the last step, from the newest checkpoint under `output` if there is one.

    Args:
        table: URI of the table to train on, of which `columns` are read in `order`.
        identity: hash of what must stay the same for a checkpoint to belong to this run.

    Returns:
        URI and manifest of the last checkpoint.

    Raises:
        NotEnoughResourcesError: the cluster is too small.
        CheckpointError: `output` holds a run of another configuration.
    """
    found = checkpoint.latest_checkpoint(output, identity)
    if found and found[1].step >= config.num_steps:
        logger.info("training is complete at step %d: %s", found[1].step, found[0])
        return found
    check_resources(config, wait_seconds=RESOURCE_WAIT_SECONDS)
    attempt = uuid.uuid4().hex[:8]
    plan = StreamPlan(
        uri=table,
        columns=columns,
        order=order,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        first_step=found[1].step if found else 0,
        num_steps=config.num_steps,
    )
    job = WorkerJob(
        config=config,
        build_task=build_task,
        plan=plan,
        output=output,
        identity=identity,
        attempt=attempt,
        resume_from=found[0] if found else None,
        tracker=tracker,
    )
    trainer = TorchTrainer(
        run_worker,  # type: ignore[arg-type]
        train_loop_config=job,  # type: ignore[arg-type]
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(name=attempt, storage_path=_ray_storage(output)),
        datasets={"train": ray.data.range(1)},
        dataset_config=PlannedData(plan),
    )
    trainer.fit()
    last = checkpoint.latest_checkpoint(output, identity)
    assert last and last[1].step == config.num_steps, "the last step always writes a checkpoint"
    return last


def _ray_storage(output: str) -> Any:
    """Where Ray Train keeps its own bookkeeping."""
    path = storage.join(output, "ray")
    return path if storage.is_s3(output) else storage.filesystem(path)[1]
