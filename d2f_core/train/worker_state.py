"""The state of one worker while it trains (its engine and its part of the averages), and the part that it saves."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from d2f_core.train import ema, partitions
from d2f_core.train.checkpoint import KINDS
from d2f_core.train.config import TrainConfig

SAVED_ALWAYS = tuple(kind for kind in KINDS if kind != "ema")


@dataclass
class Worker:
    """One worker's state while it trains."""

    config: TrainConfig
    engine: Any
    rank: int
    num_workers: int
    averages: dict[str, Tensor] = field(default_factory=dict)
    """EMA in fp32 by parameter name: of this worker's share of each parameter, or, where `partitions.is_whole`, of the
    whole parameters that this worker owns."""

    def owns(self, index: int) -> bool:
        """Whether this worker saves the parameter with this index."""
        return index % self.num_workers == self.rank

    def update_averages(self, step: int) -> None:
        """Update the averages of this worker's part; needs no communication."""
        decay = self.config.ema.decay_at(step)
        for index, (name, parameter) in enumerate(partitions.trained_parameters(self.engine).items()):
            if not partitions.is_whole(self.engine, parameter):
                weight = partitions.local_partition(self.engine, parameter)
            elif self.owns(index):
                weight = parameter.detach()
            else:
                continue
            if name not in self.averages:
                self.averages[name] = weight.clone()
            else:
                ema.update(self.averages[name], weight, decay)

    def restore_averages(self, averages: Iterable[tuple[str, Tensor]]) -> None:
        """Restore the averages from (parameter name, whole tensor); each worker keeps its part."""
        parameters = partitions.trained_parameters(self.engine)
        indices = {name: index for index, name in enumerate(parameters)}
        for name, whole in averages:
            parameter = parameters[name]
            if not partitions.is_whole(self.engine, parameter):
                device = partitions.local_partition(self.engine, parameter).device
                self.averages[name] = partitions.partition_of(self.engine, parameter, whole).to(device, copy=True)
            elif self.owns(indices[name]):
                self.averages[name] = whole.to(self.engine.device)

    def owned(self) -> Iterator[tuple[str, str, Tensor]]:
        """(kind, parameter name, whole tensor) of every tensor that this worker saves.

        Every worker must call this, and exhaust the iterator.
        """
        mine: set[str] = set()
        parts: list[partitions.Partition] = []
        for index, (name, parameter) in enumerate(partitions.trained_parameters(self.engine).items()):
            if self.owns(index):
                mine.add(name)
            for kind in KINDS if self.averages else SAVED_ALWAYS:
                if not self._is_whole(kind, parameter):
                    parts.append(partitions.Partition(kind, name, parameter, self._held(kind, name, parameter)))
                elif name in mine:
                    yield kind, name, self._held(kind, name, parameter)
        for kind, name, whole in partitions.gather(self.engine, parts):
            if name in mine:
                # A view would keep the whole exchange in memory.
                yield kind, name, whole.clone() if whole.untyped_storage().nbytes() > whole.nbytes else whole
            del whole  # free it before the next one is gathered

    def _is_whole(self, kind: str, parameter: nn.Parameter) -> bool:
        """Whether the worker that saves the tensor already holds it whole."""
        if kind in partitions.MOMENTS:
            return not self.engine.zero_optimization_stage() or not partitions.moments_exist(self.engine)
        return partitions.is_whole(self.engine, parameter)

    def _held(self, kind: str, name: str, parameter: nn.Parameter) -> Tensor:
        if kind == "ema":
            return self.averages[name]
        if kind == "weights":
            whole = partitions.is_whole(self.engine, parameter)
            return parameter.detach() if whole else partitions.local_partition(self.engine, parameter)
        if not partitions.moments_exist(self.engine):  # fp16 may skip the first steps
            return torch.zeros(partitions.whole_shape(parameter), device=self.engine.device)
        return partitions.local_partition(self.engine, parameter, kind)

    def share(self) -> dict[str, dict[str, Tensor]]:
        """This worker's share of a checkpoint's tensors, by kind; every worker must call this."""
        tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        for kind, name, tensor in self.owned():
            # Averages go to the host at once, so that the device need not hold them whole. Under stage 0 the weights
            # are the trained tensors themselves; the writer copies them before it returns.
            tensors[kind][name] = tensor.cpu() if kind == "ema" else tensor
        return tensors
