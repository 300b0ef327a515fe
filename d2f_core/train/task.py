"""What is trained, as plain functions: the only interface between a task and the training loop."""

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
    """Metrics and images from evaluating a model."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    images: Sequence[Image] = ()


@dataclass(frozen=True, kw_only=True)
class Task:
    module: nn.Module
    """The network, with equal weights on every worker; parameters with `requires_grad` are trained."""
    to_batch: Callable[[pa.Table], Batch]
    """Rows of one micro-batch, with their `epoch` and `row`, -> tensors on the worker's device."""
    loss_fn: Callable[[Network, Batch], Tensor]
    """(network, batch) -> loss per sample [micro-batch]."""
    evaluate: Callable[[], Evaluation] | None = None
    """Evaluates `module`; runs in its own process while the training continues."""
    make_grid: Callable[[Sequence[Image]], Image] | None = None
    """Images -> one picture for the log."""


class BuildTask(Protocol):
    """Builds the task; called once on each worker, and for each evaluation."""

    def __call__(self, device: str) -> Task: ...
