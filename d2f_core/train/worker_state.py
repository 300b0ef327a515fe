"""The state of one worker while it trains (its engine and its part of the averages), and the part that it saves."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2f_core.train import ema, exchange, partitions
from d2f_core.train.checkpoint import KINDS
from d2f_core.train.config import TrainConfig
from d2f_core.train.exchange import Spread

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

    def owner(self, index: int) -> int:
        """The worker that saves the parameter with this index."""
        return index % self.num_workers

    def owns(self, index: int) -> bool:
        return self.owner(index) == self.rank

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

    def spread(self, kind: str, index: int, parameter: nn.Parameter, *, reader: int) -> Spread:
        """Which elements of a moment or an average each worker keeps, when worker `reader` has it whole; moments for
        stages 1 to 3.
        """
        if kind in partitions.MOMENTS or not partitions.is_whole(self.engine, parameter):
            return partitions.spread(self.engine, parameter, reader)
        counts = np.zeros(self.num_workers, np.int64)
        counts[self.owner(index)] = parameter.numel()
        return Spread(reader, np.zeros_like(counts), counts)

    def restore_averages(self, averages: Iterable[tuple[str, Tensor]]) -> None:
        """Restore the averages from (parameter name, the elements that this worker keeps by `spread`)."""
        parameters = partitions.trained_parameters(self.engine)
        indices = {name: index for index, name in enumerate(parameters)}
        for name, stretch in averages:
            parameter = parameters[name]
            if not partitions.is_whole(self.engine, parameter):
                device = partitions.local_partition(self.engine, parameter).device
                share = partitions.laid_out(self.engine, parameter, stretch)
                self.averages[name] = share.to(device, copy=True)
            elif self.owns(indices[name]):
                self.averages[name] = stretch.view(parameter.shape).to(self.engine.device, copy=True)

    def owned(self) -> Iterator[tuple[str, str, Tensor]]:
        """(kind, parameter name, whole tensor) of every tensor that this worker saves.

        Every worker must call this, and exhaust the iterator.
        """
        parts: list[partitions.Partition] = []
        trained = list(partitions.trained_parameters(self.engine).items())
        for kind in KINDS if self.averages else SAVED_ALWAYS:
            for index in exchange.interleaved(len(trained), self.num_workers):
                name, parameter = trained[index]
                if not self._is_whole(kind, parameter):
                    held = self._held(kind, name, parameter)
                    parts.append(partitions.Partition(kind, name, parameter, held, self.owner(index)))
                elif self.owns(index):
                    yield kind, name, self._held(kind, name, parameter)
        yield from partitions.gather(self.engine, parts)

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
