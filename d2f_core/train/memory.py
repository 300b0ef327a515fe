"""Memory that one worker of a training needs, by what DeepSpeed 0.19 keeps under our engine's settings.

Each rule is checked against what engines allocate (tests/train/test_memory.py). With P trained of T parameters, b
bytes of precision and n workers:

| bytes        | stage 0 | stages 1, 2             | stage 3                                                       |
|--------------|---------|-------------------------|---------------------------------------------------------------|
| weights      | 4 T     | b T                     | b T / n, what is gathered at a time, and all below 1e5 elements |
| fp32 copies  | -       | 4 P / n (also for fp32) | 4 P / n (also for fp32)                                       |
| moments      | 8 P     | 8 P / n                 | 8 P / n                                                       |
| averages     | 4 P / n: of whole parameters where every worker has whole fp32 weights, else of the fp32 copies   |
| gradients    | 4 P     | b P; stage 2: b P / n   | b P / n                                                       |
| bucket       | copies  | b min(P, 5e8), copies   | b min(P, 5e8), copies                                         |
"""

from collections.abc import Sequence
from dataclasses import dataclass

from d2f_core.train.config import TrainConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Per element, by precision."""
MOST_IN_BUCKET = 500_000_000
"""Upper bound of the gradient bucket's elements (DeepSpeed's default); a smaller model uses its own parameter count."""
GATHERED = 550_000_000
"""Elements that stage 3 holds gathered at most: a weight stays from its forward to its backward pass when fewer than
1e9 elements are used between (so the last 5e8 of the network do), and 5e7 are fetched ahead."""
PERSISTENT = 100_000
"""Stage 3 never gives up parameters of fewer elements."""
TOGETHER = 1 << 22
"""Elements that are gathered at a time for a checkpoint, or one larger tensor."""
RUNTIME_BYTES = 1_500_000_000
"""Assumed, not counted: CUDA's context, libraries' workspaces and what the allocator cannot use."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one worker."""

    weights: int
    """As the passes use them."""
    master: int
    """fp32 copies of this worker's share."""
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
    """Whole tensors that are gathered for a checkpoint."""
    activations: int
    others: int
    """Text encoders, encoded captions, CUDA's own."""
    host: int
    """Of the host's memory: the weights when they are read, the copy of a checkpoint, and what is offloaded."""

    @property
    def state(self) -> int:
        """There all the time."""
        return self.weights + self.master + self.moments + self.averages + self.others

    @property
    def peak(self) -> int:
        """Most of the device's memory at a time."""
        passing = self.bucket + max(self.activations, self.copies)
        return self.state + max(passing + self.gradients, self.stepping + self.gradients, self.saving)


def memory_per_worker(
    config: TrainConfig, trained: Sequence[int], frozen: Sequence[int], *, activations: int = 0, others: int = 0
) -> Memory:
    """What the training takes at most on the worker that has most.

    Args:
        trained: elements of each trained parameter, in the module's order.
        frozen: likewise of the parameters that are not trained.
        activations: bytes of the passes of one micro-batch.
        others: bytes of what else lies on the device.
    """
    stage, each, number = config.zero_stage, BYTES[config.precision], config.num_workers
    total, share = sum(trained), _share(trained, stage, number)
    owned = max(sum(trained[rank::number]) for rank in range(number))
    optimizer_offload, weight_offload = config.offload != "none", config.offload == "optimizer_and_weights"
    kept = share if stage >= 2 else total
    gradients = 0 if optimizer_offload and stage >= 2 else each * kept
    partition = each * (share + _share(frozen, 3, number)) if stage == 3 else 0
    master, moments = (0 if stage == 0 else 4 * share), 8 * share
    offloaded = master + moments + (4 + each) * share if optimizer_offload else 0
    whole = each == 4 and stage < 3  # every worker has the whole fp32 weights
    averages = 4 * (owned if whole else share) if config.ema.decay else 0
    averages_offload = optimizer_offload and not whole
    # The fp32 copy is the gradient itself where that is in fp32 already; norms are taken in double precision.
    step = max(each * share + (0 if each == 4 else 4 * share), 8 * max(trained, default=0)) if stage else 0
    kinds = (2 if whole else 3) + (1 if config.ema.decay and not whole else 0)
    exchanged = max(max(trained, default=0), min(kinds * total, TOGETHER))
    weights = partition + _gathered(each, [*trained, *frozen]) if stage == 3 else each * (total + sum(frozen))
    return Memory(
        weights=weights - (partition if weight_offload else 0),
        master=0 if optimizer_offload else master,
        moments=0 if optimizer_offload else moments,
        averages=0 if averages_offload else averages,
        gradients=gradients,
        bucket=each * min(total, MOST_IN_BUCKET) if stage else 0,
        copies=each * min(total, MOST_IN_BUCKET),
        stepping=0 if optimizer_offload else step,
        # Both moments, and the weights that are not at hand, of this worker's parameters; what is being gathered, and
        # what was before, which the exchange may still hold. Averages go to the host one by one. Stage 0 hands out its
        # own tensors.
        saving=0 if stage == 0 else (8 if whole else 12) * owned + 8 * exchanged,
        activations=activations,
        others=others,
        # A kind at a time is put into one safetensors file beside the copy of all four.
        host=max(4 * (total + sum(frozen)), (16 if config.ema.decay else 12) * owned + 4 * owned)
        + offloaded
        + (averages if averages_offload else 0)
        + (partition if weight_offload else 0),
    )


def _share(elements: Sequence[int], stage: int, number: int) -> int:
    """Elements of one worker's share."""
    if stage == 0:
        return sum(elements)
    if stage == 3:  # each parameter by itself
        return sum(-(-count // number) for count in elements)
    return -(-sum(elements) // (2 * number)) * 2


def _gathered(each: int, elements: Sequence[int]) -> int:
    """Bytes of whole weights under stage 3."""
    small = sum(count for count in elements if count < PERSISTENT)
    return each * (small + min(sum(elements) - small, GATHERED))
