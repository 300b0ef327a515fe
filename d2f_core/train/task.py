"""What is trained, as plain functions: all that the training rails know about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
from PIL.Image import Image
from torch import Tensor, nn

Network = Callable[..., Any]
"""The module, or the engine around it: called with the module's own arguments."""

Batch = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one worker found on its share: sums that add up over workers, and images in order."""

    sums: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Metric name -> (sum, count)."""
    images: Sequence[Image] = ()


@dataclass(frozen=True, kw_only=True)
class Task:
    module: nn.Module
    """Equal on every worker; parameters with `requires_grad` are trained."""
    to_batch: Callable[[pa.Table], Batch]
    """Rows of one micro-batch, with their `epoch` and `row`, -> tensors on the worker's device."""
    loss_fn: Callable[[Network, Batch], Tensor]
    """(network, batch) -> loss per sample [micro-batch]."""
    evaluate: Callable[[Network, int, int], Evaluation] | None = None
    """(network, rank, num_workers) -> this worker's share. Every worker makes equally many calls of the network."""
    make_grid: Callable[[Sequence[Image]], Image] | None = None
    """All workers' images, in order, -> one picture for the log."""


def share_of(count: int, rank: int, num_workers: int) -> tuple[slice, bool]:
    """One worker's contiguous share of `count` items, and whether its result counts.

    A worker for which none are left gets the first item and False: under ZeRO 3 all workers must call the network
    equally often, whatever they make of it.
    """
    each, rest = divmod(count, num_workers)
    first, size = rank * each + min(rank, rest), each + (rank < rest)
    return (slice(first, first + size), True) if size else (slice(0, 1), False)


class BuildTask(Protocol):
    """Called once on each worker."""

    def __call__(self, device: str) -> Task: ...


class Tracker(Protocol):
    """Where metrics go; used on the first worker only."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_image(self, name: str, image: Image, step: int) -> None: ...
