"""Memory that one worker of a training needs, from what DeepSpeed 0.19 allocates under this project's settings.

Each rule is checked against what engines allocate (tests/train/test_memory.py). With P trained of T parameters, b
bytes of precision, g of the gradients' sums (`gradient_precision`) and n workers:

| bytes        | stage 0 | stages 1, 2             | stage 3                                                       |
|--------------|---------|-------------------------|---------------------------------------------------------------|
| weights      | 4 T     | b T                     | b T / n, what is gathered at a time, and all below 1e5 elements |
| fp32 copies  | -       | 4 P / n (also for fp32) | 4 P / n (also for fp32)                                       |
| moments      | 8 P     | 8 P / n                 | 8 P / n                                                       |
| averages     | 4 P / n: of whole parameters where every worker has whole fp32 weights, else of the fp32 copies   |
| gradients    | 4 P     | g P; stage 2: g P / n   | g P / n                                                       |
| bucket       | copies  | g min(P, 5e8), copies   | g min(P, 5e8), copies                                         |

Where g is more than b, stage 1 keeps a worker's part of the sums apart (g P / n), and the bucket of stage 2 takes b.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from d2f_core.train.config import TrainConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes per element of each precision."""
MOST_IN_BUCKET = 500_000_000
"""Upper bound of the gradient bucket's elements (DeepSpeed's default); a smaller model uses its own parameter count."""
GATHERED = 550_000_000
"""Most elements that stage 3 holds gathered: a weight stays from its forward to its backward pass if fewer than 1e9
elements are used in between (true for the last 5e8 of the network), and 5e7 are prefetched."""
PERSISTENT = 100_000
"""Parameters with fewer elements stay gathered under stage 3."""
TOGETHER = 1 << 22
"""Elements that a worker sends or receives at once for a checkpoint; a larger tensor is exchanged alone."""
RUNTIME_BYTES = 1_500_000_000
"""Assumed, not counted: CUDA's context, libraries' workspaces and the allocator's fragmentation."""
PROCESS_BYTES = 1_500_000_000
"""Assumed, not counted: a worker's interpreter with torch, DeepSpeed, diffusers and Ray, and the rows of its stream."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one worker needs, on its device unless stated otherwise."""

    weights: int
    """Weights in the dtype of the forward and backward passes."""
    master: int
    """fp32 copies of the weights in this worker's share."""
    moments: int
    averages: int
    gradients: int
    bucket: int
    """The gradient bucket."""
    copies: int
    """Copies of gradients while they are exchanged, at the end of the backward pass."""
    stepping: int
    """Copies of gradients during the optimizer's step."""
    saving: int
    """Whole tensors gathered for a checkpoint."""
    activations: int
    others: int
    """Text encoders, encoded captions and CUDA's own memory."""
    evaluation: int
    """An evaluation between steps: what it reads and draws with, its passes, and at stage 3 a second network."""
    host: int
    """Host memory: the weights while they are read, the copy of a checkpoint, and offloaded state."""

    @property
    def state(self) -> int:
        """Bytes that stay allocated for the whole training."""
        return self.weights + self.master + self.moments + self.averages + self.others

    @property
    def peak(self) -> int:
        """Peak of the device's memory."""
        passing = self.bucket + max(self.activations, self.copies)
        evaluating = self.bucket + self.evaluation
        stepping = max(passing, self.stepping, evaluating) + self.gradients
        return self.state + max(stepping, self.saving)


def memory_per_worker(
    config: TrainConfig,
    trained: Sequence[int],
    frozen: Sequence[int],
    *,
    activations: int = 0,
    others: int = 0,
    evaluation: int = 0,
) -> Memory:
    """Peak memory of the worker with the largest share.

    Args:
        trained: elements of each trained parameter, in the module's order.
        frozen: elements of each frozen parameter.
        activations: bytes of activations for one micro-batch.
        others: bytes of everything else on the device.
        evaluation: bytes of an evaluation between steps besides a second network; 0: there is none.
    """
    sizes = _Sizes(config, trained, frozen)
    on_device = not sizes.optimizer_offload
    return Memory(
        weights=_weights(sizes) - (sizes.partition if sizes.weight_offload else 0),
        master=sizes.master if on_device else 0,
        moments=sizes.moments if on_device else 0,
        averages=0 if sizes.averages_offload else sizes.averages,
        gradients=_gradients(sizes),
        bucket=_bucket(sizes) if sizes.stage else 0,
        copies=_copies(sizes),
        stepping=_stepping(sizes) if on_device else 0,
        saving=_saving(sizes),
        activations=activations,
        others=others,
        evaluation=evaluation + (sizes.each * sizes.all if evaluation and sizes.stage == 3 else 0),
        host=_host(sizes) + (_evaluating_on_host(sizes) if evaluation else 0),
    )


def host_bytes(memory: Memory, *, use_gpu: bool) -> int:
    """What a worker takes of the host's memory: its process, and all that it computes with where it has no GPU."""
    return PROCESS_BYTES + memory.host + (0 if use_gpu else memory.peak)


class _Sizes:
    """Sizes and settings that the rules are computed from."""

    def __init__(self, config: TrainConfig, trained: Sequence[int], frozen: Sequence[int]) -> None:
        self.trained, self.frozen = trained, frozen
        self.stage, self.workers = config.zero_stage, config.num_workers
        self.each = BYTES[config.precision]
        """Bytes of an element in the passes."""
        self.summed = 4 if config.gradient_precision == "fp32" else self.each
        """Bytes of an element of a gradient that is added up."""
        self.widened = self.summed > self.each
        """Whether gradients are added up in more digits than they are computed in."""
        self.total, self.all = sum(trained), sum(trained) + sum(frozen)
        """Number of trained elements, and of all elements of the network."""
        self.largest = max(trained, default=0)
        """Elements of the largest trained parameter."""
        self.share = _share(trained, self.stage, self.workers)
        """Elements of a worker's share of the fp32 weights, and of each moment."""
        self.owned = max(sum(trained[rank :: self.workers]) for rank in range(self.workers))
        """Elements of the whole parameters that one worker averages and saves."""
        self.averaging = bool(config.ema.decay)
        self.optimizer_offload = config.offload != "none"
        self.weight_offload = config.offload == "optimizer_and_weights"
        self.whole = self.each == 4 and self.stage < 3
        """Whether every worker has whole fp32 weights."""

    @property
    def partition(self) -> int:
        """Bytes of the worker's partition of the passes' weights; 0 below stage 3, where they are not partitioned."""
        return self.each * (self.share + _share(self.frozen, 3, self.workers)) if self.stage == 3 else 0

    @property
    def master(self) -> int:
        return 0 if self.stage == 0 else 4 * self.share

    @property
    def moments(self) -> int:
        return 8 * self.share

    @property
    def averages(self) -> int:
        return 4 * (self.owned if self.whole else self.share) if self.averaging else 0

    @property
    def averages_offload(self) -> bool:
        return self.optimizer_offload and not self.whole


def _weights(sizes: _Sizes) -> int:
    if sizes.stage < 3:
        return sizes.each * sizes.all
    return sizes.partition + _gathered(sizes.each, [*sizes.trained, *sizes.frozen])


def _gradients(sizes: _Sizes) -> int:
    apart = sizes.summed * sizes.share
    if sizes.stage < 2:
        return sizes.summed * sizes.total + (apart if sizes.widened else 0)
    kept_on_host = sizes.optimizer_offload and not (sizes.stage == 2 and sizes.widened)
    return 0 if kept_on_host else apart


def _bucket(sizes: _Sizes) -> int:
    each = sizes.each if sizes.stage == 2 else sizes.summed
    return each * min(sizes.total, MOST_IN_BUCKET)


def _copies(sizes: _Sizes) -> int:
    return sizes.summed * min(sizes.total, MOST_IN_BUCKET)


def _stepping(sizes: _Sizes) -> int:
    """Bytes of gradient copies in the optimizer's step: the share and its fp32 copy (none if it already is fp32), or
    one tensor in double precision for its norm.
    """
    if sizes.stage == 0:
        return 0
    copy = 0 if sizes.summed == 4 else 4 * sizes.share
    return max(sizes.summed * sizes.share + copy, 8 * sizes.largest)


def _saving(sizes: _Sizes) -> int:
    """Bytes of whole tensors for a checkpoint: both moments of this worker's parameters, and the weights unless it
    holds them whole; plus what is sent, or has been received, in the exchange at work. Averages are moved to the host
    one by one. Stage 0 needs no copies.
    """
    if sizes.stage == 0:
        return 0
    kinds = (2 if sizes.whole else 3) + (1 if sizes.averaging and not sizes.whole else 0)
    exchanged = max(sizes.largest, min(kinds * max(sizes.owned, sizes.share), TOGETHER))
    return (8 if sizes.whole else 12) * sizes.owned + 4 * exchanged


def _evaluating_on_host(sizes: _Sizes) -> int:
    """Bytes of the trained weights while others take their place, or of a second network while it is read."""
    return 4 * sizes.all if sizes.stage == 3 else sizes.each * sizes.total


def _host(sizes: _Sizes) -> int:
    """The weights when they are read, or the copy of a checkpoint, which is its files' bytes; and what is offloaded."""
    copies = (16 if sizes.averaging else 12) * sizes.owned
    sums = 0 if sizes.widened and sizes.stage < 3 else sizes.summed * sizes.share  # else they stay on the device
    optimizer = sizes.master + sizes.moments + 4 * sizes.share + sums
    return (
        max(4 * sizes.all, copies)
        + (optimizer if sizes.optimizer_offload else 0)
        + (sizes.averages if sizes.averages_offload else 0)
        + (sizes.partition if sizes.weight_offload else 0)
    )


def _share(elements: Sequence[int], stage: int, number: int) -> int:
    """Number of elements in one of `number` workers' share."""
    if stage == 0:
        return sum(elements)
    if stage == 3:  # each parameter is partitioned separately
        return sum(-(-count // number) for count in elements)
    return -(-sum(elements) // (2 * number)) * 2


def _gathered(each: int, elements: Sequence[int]) -> int:
    """Bytes of weights that stage 3 holds gathered."""
    small = sum(count for count in elements if count < PERSISTENT)
    return each * (small + min(sum(elements) - small, GATHERED))
