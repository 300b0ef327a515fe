"""A training without Ray Train and DeepSpeed: its own task, data order and checkpoint format, and plain torch between.

For workflows whose test is about what comes before and after the training; that runs as it is in
tests/pipelines/test_finetune.py, tests/pipelines/test_workflow.py and tests/chaos.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import nn

from d2f_core.data.plan_reader import EPOCH, ROW, planned_table
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.data.table_reader import RowReader
from d2f_core.tracking import RunHandle
from d2f_core.train import checkpoint, ema
from d2f_core.train.checkpoint_writer import CheckpointWriter
from d2f_core.train.config import TrainConfig
from d2f_core.train.evaluation import EvaluationJob, evaluate
from d2f_core.train.launch import Trained
from d2f_core.train.steps import train_steps
from d2f_core.train.task import BuildTask
from pipelines import training


class PlainEngine:
    """AdamW on the module itself, with DeepSpeed's calls."""

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        self.module, self.config = module, config
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=config.learning_rate, betas=(0.9, config.beta2))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.trained.values(), self.config.clip_grad_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()


def rows_of(plan: StreamPlan) -> Iterator[pa.Table]:
    readers = [RowReader(source.uri, planned_table(plan, source.uri), plan.columns) for source in plan.sources]
    for number in range(plan.num_steps * plan.per_step(1)):
        one = plan.micro_batch(number, 0, 1)
        table = readers[one.source].read(one.rows).append_column(EPOCH, pa.array(one.epochs))
        yield table.append_column(ROW, pa.array(one.rows + plan.first_rows[one.source]))


def run_training(
    *,
    config: TrainConfig,
    build_task: BuildTask,
    plan: StreamPlan,
    output: str,
    identity: str,
    tracker: RunHandle | None = None,
    worker_bytes: Callable[[TrainConfig], int] | None = None,
) -> Trained:
    """As `d2f_core.train.launch.run_training`, to the end at once."""
    del worker_bytes  # nothing is reserved here
    there = checkpoint.candidates(output, identity)
    if there and there[0].manifest.step >= config.num_steps:
        return Trained(last=there[0], owed=())
    task = build_task("cpu")
    engine = PlainEngine(task.module, config)
    averages = {name: parameter.detach().clone() for name, parameter in engine.trained.items()}
    for result in train_steps(engine, rows_of(plan), task.to_batch, task.loss_fn, accumulation=plan.per_step(1)):
        for name, parameter in engine.trained.items():
            ema.update(averages[name], parameter.detach(), config.ema.decay_at(result.step))
    tensors = {"weights": {name: parameter.detach() for name, parameter in engine.trained.items()}}
    if config.ema.decay:
        tensors["ema"] = averages
    writer = CheckpointWriter(output, "here", 0, 1, config.retention)
    samples = config.num_steps * config.global_batch_size
    writer.save(config.num_steps, samples=samples, identity=identity, tensors=tensors, state={})
    writer.wait()
    writer.close()
    last = checkpoint.candidates(output, identity)[0]
    if config.evaluate_every and task.evaluate:
        job = EvaluationJob(
            build_task=build_task, output=output, step=config.num_steps, uri=last.uri,
            averaged=bool(config.ema.decay), num_gpus=0, tracker=tracker,
        )  # fmt: skip
        evaluate(job, "cpu")
    return Trained(last=last, owed=())


@contextlib.contextmanager
def trained_here() -> Iterator[None]:
    """Trainings run in this process."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "run_training", run_training)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
