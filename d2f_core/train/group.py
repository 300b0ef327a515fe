"""What all workers of a training do as one: they begin together, and fail together, with the same sentence."""

import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
Device = torch.device | str

LONGEST_WORK_SECONDS = 3600.0
"""Seconds after which work that all wait for counts as failed."""
SIGN_SECONDS = 5.0
"""Seconds between two signs of a worker that is still at work: a collective that waited for it throughout would end by
its own time limit, however well the work goes."""


def rank_and_count() -> tuple[int, int]:
    """This worker's rank and the number of workers; a process without a group is alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def of_first(make: Callable[[], T], device: Device) -> T:
    """What the first worker makes, on every worker; its error, if it fails, is raised by all."""
    rank, _ = rank_and_count()
    made = together(lambda: make() if rank == 0 else None, device, "make what all need")
    return _broadcast(made, 0, device)  # type: ignore[return-value]  # the first worker's is no None


def together(work: Callable[[], T], device: Device, what: str) -> T:
    """`work()` of this worker, when that of every worker is done. Every worker must call this.

    It must not use collectives, and may take up to `LONGEST_WORK_SECONDS`.

    Args:
        what: completes "could not ...", for work that does not end.

    Raises:
        Exception: on every worker alike, the error of the first one whose work failed.
    """
    if rank_and_count()[1] == 1:
        return work()
    future, deadline = _begun(work), time.monotonic() + LONGEST_WORK_SECONDS
    while _smallest(int(future.done() or time.monotonic() > deadline), device) == 0:
        wait([future], timeout=SIGN_SECONDS)
    failure = future.exception() if future.done() else TimeoutError(f"could not {what} in {LONGEST_WORK_SECONDS:.0f} s")
    refuse_any(failure, device)
    return future.result()


def refuse_any(failure: BaseException | None, device: Device) -> None:
    """Raise the failure of the first worker that has one. Every worker must call this."""
    rank, count = rank_and_count()
    first = _smallest(rank if failure else count, device)
    if first == rank and failure:
        _broadcast(_portable(failure), first, device)
        raise failure
    if first < count:
        raise _broadcast(failure, first, device) or AssertionError("a failure has come without its error")


def summed(numbers: torch.Tensor, device: Device) -> torch.Tensor:
    """The sum over all workers of int64 numbers, in the host's memory."""
    if rank_and_count()[1] == 1:
        return numbers
    numbers = numbers.to(device)
    dist.all_reduce(numbers)
    return numbers.cpu()


def _begun(work: Callable[[], T]) -> "Future[T]":
    """The work in a thread of its own, which does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # of any type: every worker raises it
            future.set_exception(error)

    threading.Thread(target=run, name="together", daemon=True).start()
    return future


def _smallest(number: int, device: Device) -> int:
    if rank_and_count()[1] == 1:
        return number
    found = torch.tensor([number], device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)


def _broadcast(value: T, source: int, device: Device) -> T:
    if rank_and_count()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, source, device=torch.device(device))
    return values[0]


def _portable(error: BaseException) -> BaseException:
    """The error, or one of the same text when another process could not be given it."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception as trouble:
        return RuntimeError(f"{type(error).__name__}: {error} ({type(trouble).__name__} when it was passed on)")
    return RuntimeError(f"{type(error).__name__}: {error}")
