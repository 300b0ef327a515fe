"""Each worker's partition of the fp32 weights and moments, and its conversion to whole tensors and back.

The only module that knows how DeepSpeed lays parameters out:

| stage | a worker's share of a parameter                                                                       |
|-------|-------------------------------------------------------------------------------------------------------|
| 0     | all of it                                                                                             |
| 1, 2  | all parameters, end to end, are cut into equal parts: one stretch of the flattened parameter, or none |
| 3     | each flattened parameter is cut into equal parts by itself; the last ones are padded                  |

The fp32 values of a share are in host memory when they are offloaded.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from d2f_core.train import exchange
from d2f_core.train.exchange import Spread
from d2f_core.train.group import rank_and_count

MOMENTS = ("exp_avg", "exp_avg_sq")


class Partition(NamedTuple):
    """One worker's part of one tensor."""

    kind: str
    name: str
    parameter: nn.Parameter
    local: Tensor
    owner: int
    """The worker that saves the whole tensor."""


def trained_parameters(engine: Any) -> dict[str, nn.Parameter]:
    """Name -> parameter for all trained parameters, in the module's order."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def is_whole(engine: Any, parameter: nn.Parameter) -> bool:
    """Whether every worker holds the whole fp32 weight and computes with it."""
    return engine.zero_optimization_stage() < 3 and parameter.dtype == torch.float32


def local_partition(engine: Any, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
    """This worker's share of the fp32 weight, or of one of its moments, as a view of the engine's own tensor.

    Flat above stage 0. Needs no communication.
    """
    stage = engine.zero_optimization_stage()
    if not stage:
        return engine.optimizer.state[parameter][moment] if moment else parameter.detach()
    if stage == 3:
        # DeepSpeed's public safe_get_local_* copy offloaded numbers to the device.
        find = cast(Any, parameter)._z3_optimizer._get_fp32_opt_state_partition
        return find(parameter, release_swap_buffers=False, optim_state_key=moment)[0].detach()
    stretch = cast(Any, parameter)._hp_mapping
    return stretch.get_hp_fragment(moment).detach() if stretch else torch.empty(0)


def spread(engine: Any, parameter: nn.Parameter, owner: int) -> Spread:
    """The stretches of a parameter in all workers' shares, for stages 1 to 3.

    Args:
        owner: the worker that has, or is to get, the whole tensor.
    """
    size, (_, workers) = whole_shape(parameter).numel(), rank_and_count()
    if engine.zero_optimization_stage() == 3:
        each = cast(Any, parameter).ds_tensor.ds_numel
        starts = np.minimum(each * np.arange(workers), size)
        return Spread(owner, starts, np.minimum(size - starts, each))
    offset, share = _places(engine)[id(parameter)]
    bounds = np.clip(share * np.arange(workers + 1) - offset, 0, size)
    return Spread(owner, bounds[:-1], np.diff(bounds))


_PLACES: WeakKeyDictionary[Any, dict[int, tuple[int, int]]] = WeakKeyDictionary()


def _places(engine: Any) -> dict[int, tuple[int, int]]:
    """For stages 1 and 2, id of a parameter -> its first element among all parameters end to end, and the elements of a
    worker's share of these.
    """
    optimizer = engine.optimizer
    if optimizer not in _PLACES:
        _PLACES[optimizer] = {
            id(parameter): (offset, share)
            for parameters, offsets, share in zip(
                optimizer.round_robin_bit16_groups,
                optimizer.round_robin_bit16_offsets,
                optimizer.partition_size,
                strict=True,
            )
            for parameter, offset in zip(parameters, offsets, strict=True)
        }
    return _PLACES[optimizer]


def laid_out(engine: Any, parameter: nn.Parameter, stretch: Tensor) -> Tensor:
    """This worker's stretch of a flattened tensor as `local_partition` has it: padded under stage 3, and in the
    parameter's shape under stage 0.
    """
    if not engine.zero_optimization_stage():
        return stretch.view(parameter.shape)
    if engine.zero_optimization_stage() != 3:
        return stretch
    return nn.functional.pad(stretch, (0, cast(Any, parameter).ds_tensor.ds_numel - stretch.numel()))


def partition_of(engine: Any, parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """This worker's share of `whole`, a tensor of the parameter's shape, laid out like `local_partition`."""
    if not engine.zero_optimization_stage():
        return whole
    rank, _ = rank_and_count()
    where = spread(engine, parameter, rank)
    return laid_out(engine, parameter, whole.flatten()[where.starts[rank] :][: where.counts[rank]])


def gather(engine: Any, parts: Iterable[Partition]) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, name, whole tensor in the parameter's shape) for each part that this worker owns; for stages 1 to 3.

    Each worker's stretch goes to the tensor's owner alone. Every worker must call this, with the same parameters in the
    same order, and exhaust the iterator.
    """
    placed = ((part, spread(engine, part.parameter, part.owner)) for part in parts)
    rank, _ = rank_and_count()
    for batch in exchange.in_batches(placed, lambda item: item[1].load):
        # Without a stretch's padding.
        stretches = [part.local.flatten()[: where.counts[rank]] for part, where in batch]
        for index, whole in exchange.gather([where for _, where in batch], stretches, engine.device):
            part = batch[index][0]
            yield part.kind, part.name, whole.view(whole_shape(part.parameter))


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter; under stage 3 the parameter itself is empty."""
    return cast(torch.Size, getattr(parameter, "ds_shape", parameter.shape))


def write(engine: Any, parameter: nn.Parameter, whole: Tensor, moment: str | None = None) -> None:
    """Set the fp32 weight, or one of its moments, from a whole tensor; each worker stores its share."""
    write_partition(engine, parameter, partition_of(engine, parameter, whole), moment)


def write_partition(engine: Any, parameter: nn.Parameter, share: Tensor, moment: str | None = None) -> None:
    """Set this worker's share of the fp32 weight, or of one of its moments, from one laid out like `partition_of`'s."""
    local_partition(engine, parameter, moment).copy_(share)


def inner_optimizer(engine: Any) -> Any:
    """The torch optimizer that DeepSpeed's optimizer wraps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def moments_exist(engine: Any) -> bool:
    return any(MOMENTS[0] in state for state in inner_optimizer(engine).state.values())
