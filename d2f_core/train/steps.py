"""The training step; it needs an engine and batches, but no cluster."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from d2f_core.data.plan_reader import EPOCH, REASON, ROW
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
    unusable: tuple[tuple[int, str], ...] = ()
    """(row, reason) of the unusable rows in this worker's share."""
    consumed: int = 0
    """`consumed_digest` of this worker's share."""
    signals: int = 0
    """Sum of all workers' signals of this step; equal on every worker."""


def _exchange(finite: list[Tensor], rows: list[list[int]], step: int, said: int) -> int:
    """Raise on all workers together before the gradients of a non-finite batch are used; returns the sum of their
    signals.

    The only device-to-host copy per step; needed because weights with NaN cannot be saved.
    """
    broken = torch.stack([(~fine).sum() for fine in finite]).sum()
    numbers = torch.stack([broken, torch.full_like(broken, said)])
    if dist.is_initialized():
        dist.all_reduce(numbers)
    count, signals = numbers.tolist()
    if count:
        pairs = zip(rows, (fine.tolist() for fine in finite), strict=True)
        bad = [row for part, fine in pairs for row, good in zip(part, fine, strict=True) if not good]
        raise NonFiniteLossError(
            f"step {step}: the loss of {count} samples is not finite"
            f"{f' (table rows {bad} on this worker)' if bad else ' (rows are named by another worker)'}. "
            "Lower the learning rate, or look at these rows; the last checkpoint is good."
        )
    return signals


def consumed_digest(epochs: np.ndarray, rows: np.ndarray) -> int:
    """Digest of a set of (epoch, row), int64 each; digests of disjoint sets add up, modulo 2**64, in any order.

    Equal digests mean equal samples (up to hash collisions), so runs can be compared by the samples they consumed.
    """
    mixed = epochs.astype(np.uint64) << np.uint64(40) ^ rows.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # splitmix64's finaliser
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return int(mixed.sum(dtype=np.uint64))


def unusable_rows(table: pa.Table) -> tuple[tuple[int, str], ...]:
    """(row, reason) of the rows that keep their place in the batch but must not count."""
    if REASON not in table.column_names or table.column(REASON).null_count == table.num_rows:
        return ()
    pairs = zip(table.column(ROW).to_pylist(), table.column(REASON).to_pylist(), strict=True)
    return tuple((row, reason) for row, reason in pairs if reason is not None)


def train_steps(
    engine: Engine,
    rows: Iterable[pa.Table],
    to_batch: Callable[[pa.Table], Batch],
    loss_fn: Callable[[Any, Batch], Tensor],
    *,
    accumulation: int,
    first_step: int = 0,
    before_step: Callable[[int], None] | None = None,
    signal: Callable[[], int] | None = None,
) -> Iterator[StepResult]:
    """Run optimizer steps, lazily; the caller decides when to log, save and stop.

    An unusable row adds nothing to the gradient, and the mean is still taken over all rows of the plan, so the result
    does not depend on which worker got the row.

    Args:
        rows: one micro-batch each, `accumulation` of them per step.
        before_step: called with the step's number, counted from 0 (sets the learning rate).
        signal: called once per step; the sum over all workers is returned as `StepResult.signals` without another
            exchange, so that all workers agree on the step of an unscheduled action.

    Raises:
        NonFiniteLossError: raised on every worker at once; names the step and the rows, and leaves the weights
            unchanged.
    """
    step, iterator = first_step, iter(rows)
    while True:
        waited, mean, finite, numbers, unusable, consumed, signals = 0.0, torch.zeros(()), [], [], (), 0, 0
        for part in range(accumulation):
            began = time.perf_counter()
            table = next(iterator, None)
            waited += time.perf_counter() - began
            if table is None:
                return
            if part == 0 and before_step:
                before_step(step)
            losses = loss_fn(engine, to_batch(table))
            if bad := unusable_rows(table):
                counts = torch.tensor(table.column(REASON).is_null().to_pylist(), device=losses.device)
                losses, unusable = torch.where(counts, losses, 0.0), unusable + bad
            finite.append(torch.isfinite(losses.detach()))
            numbers.append(table.column(ROW).to_pylist())
            consumed += consumed_digest(table.column(EPOCH).to_numpy(), table.column(ROW).to_numpy())
            if part == accumulation - 1:
                signals = _exchange(finite, numbers, step, signal() if signal else 0)
            engine.backward(losses.mean())
            engine.step()
            mean = mean.to(losses.device) + losses.detach().mean() / accumulation
        step += 1
        yield StepResult(step=step, loss=mean, waited=waited, unusable=unusable, consumed=consumed, signals=signals)
