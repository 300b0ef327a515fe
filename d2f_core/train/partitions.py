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

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2f_core.train.memory import TOGETHER

MOMENTS = ("exp_avg", "exp_avg_sq")


class Partition(NamedTuple):
    """One worker's part of one tensor."""

    kind: str
    name: str
    parameter: nn.Parameter
    local: Tensor


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


def partition_of(engine: Any, parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """This worker's share of `whole`, a tensor of the parameter's shape, laid out like `local_partition`."""
    stage = engine.zero_optimization_stage()
    if not stage:
        return whole
    if stage == 3:
        count = cast(Any, parameter).ds_tensor.ds_numel
        share = whole.flatten()[count * dist.get_rank() :][:count]
        return nn.functional.pad(share, (0, count - share.numel()))
    stretch = cast(Any, parameter)._hp_mapping
    if not stretch:
        return whole.flatten()[:0]
    return whole.flatten().narrow(0, stretch.lp_fragment_address.start, stretch.lp_fragment_address.numel)


def gather(engine: Any, parts: Iterable[Partition]) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, name, whole tensor in the parameter's shape) for each part, gathered from all workers; for stages 1 to 3.

    `TOGETHER` elements, or one larger tensor, are exchanged at a time: the latency of a collective exceeds the transfer
    of a small tensor, and an adapter has thousands of them. A tensor may be a view of the whole exchange. Every worker
    must call this, with the same parameters in the same order, and exhaust the iterator.
    """
    group: list[Partition] = []
    size = 0
    for part in parts:
        count = whole_shape(part.parameter).numel()
        if group and size + count > TOGETHER:
            yield from _exchange(engine, group)
            group, size = [], 0
        group.append(part)
        size += count
    if group:
        yield from _exchange(engine, group)


def _exchange(engine: Any, group: list[Partition]) -> Iterator[tuple[str, str, Tensor]]:
    """Gather all tensors of the group with one collective."""
    shapes = [whole_shape(part.parameter) for part in group]
    if engine.zero_optimization_stage() == 3:
        mine = torch.cat([part.local.to(engine.device) for part in group])
        gathered = torch.empty(dist.get_world_size() * mine.numel(), device=engine.device)
        dist.all_gather_into_tensor(gathered, mine)
        del mine
        columns = gathered.view(dist.get_world_size(), -1).split([part.local.numel() for part in group], dim=1)
        wholes = (each.flatten()[: shape.numel()] for each, shape in zip(columns, shapes, strict=True))
    else:
        # Summed as integers, because -0.0 + 0.0 is +0.0, whose hash would differ from the checkpoint's.
        counts = [shape.numel() for shape in shapes]
        bits = torch.zeros(sum(counts), dtype=torch.int32, device=engine.device)
        for part, whole in zip(group, bits.split(counts), strict=True):
            partition_of(engine, part.parameter, whole).copy_(part.local.view(torch.int32))
        dist.all_reduce(bits)
        wholes = iter(bits.view(torch.float32).split(counts))
    for part, shape, whole in zip(group, shapes, wholes, strict=True):
        yield part.kind, part.name, whole.view(shape)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter; under stage 3 the parameter itself is empty."""
    return cast(torch.Size, getattr(parameter, "ds_shape", parameter.shape))


def write(engine: Any, parameter: nn.Parameter, whole: Tensor, moment: str | None = None) -> None:
    """Set the fp32 weight, or one of its moments, from a whole tensor; each worker stores its share."""
    local_partition(engine, parameter, moment).copy_(partition_of(engine, parameter, whole))


def inner_optimizer(engine: Any) -> Any:
    """The torch optimizer that DeepSpeed's optimizer wraps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def moments_exist(engine: Any) -> bool:
    return any(MOMENTS[0] in state for state in inner_optimizer(engine).state.values())
