"""The training step: needs an engine and batches, no cluster."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from d2f_core.train.task import Batch


class NonFiniteLossError(FloatingPointError):
    """A loss was not finite, on at least one worker; no weight was changed by that step."""


class Engine(Protocol):
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def backward(self, loss: Tensor) -> Any: ...

    def step(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class StepResult:
    step: int
    """Optimizer steps done, this one included."""
    loss: Tensor
    """Mean over this worker's share, still on the device."""
    waited: float
    """Seconds spent waiting for rows."""


def _check_finite(losses: Tensor, rows: list[int], step: int) -> None:
    """Stop every worker together, before the gradients of a broken batch are used."""
    bad = [row for row, fine in zip(rows, torch.isfinite(losses).tolist(), strict=True) if not fine]
    flag = torch.tensor([len(bad)], device=losses.device)
    if dist.is_initialized():
        dist.all_reduce(flag)
    if flag.item():
        raise NonFiniteLossError(
            f"step {step}: the loss of {int(flag.item())} samples is not finite"
            f"{f' (table rows {bad} on this worker)' if bad else ' (rows are named by another worker)'}. "
            "Lower the learning rate, or look at these rows; the last checkpoint is good."
        )


def train_steps(
    engine: Engine,
    rows: Iterable[pa.Table],
    to_batch: Callable[[pa.Table], Batch],
    loss_fn: Callable[[Any, Batch], Tensor],
    *,
    accumulation: int,
    first_step: int = 0,
    before_step: Callable[[int], None] | None = None,
) -> Iterator[StepResult]:
    """Run optimizer steps, lazily; the caller decides when to log, save and stop.

    Args:
        rows: one micro-batch each, `accumulation` of them per step.
        before_step: called with the step's number, counted from 0 (sets the learning rate).

    Raises:
        NonFiniteLossError: on every worker at once; names the step and the rows, and leaves the weights alone.
    """
    step, part, waited, mean = first_step, 0, 0.0, torch.zeros(())
    iterator = iter(rows)
    while True:
        began = time.perf_counter()
        table = next(iterator, None)
        if table is None:
            return
        waited += time.perf_counter() - began
        if part == 0 and before_step:
            before_step(step)
        losses = loss_fn(engine, to_batch(table))
        _check_finite(losses.detach(), table.column("row").to_pylist(), step)
        engine.backward(losses.mean())
        engine.step()
        mean = mean.to(losses.device) + losses.detach().mean() / accumulation
        part += 1
        if part == accumulation:
            step += 1
            yield StepResult(step=step, loss=mean, waited=waited)
            part, waited, mean = 0, 0.0, torch.zeros(())
