"""What each worker holds of the fp32 weights and moments, and the way from it to whole tensors and back.

The only module that knows how DeepSpeed lays parameters out:

| stage | a worker's share of a parameter                                                                       |
|-------|-------------------------------------------------------------------------------------------------------|
| 0     | all of it                                                                                             |
| 1, 2  | all parameters, end to end, are cut into equal parts: one stretch of the flattened parameter, or none |
| 3     | each flattened parameter is cut into equal parts by itself; the last ones are padded                  |

The fp32 numbers of a share lie in the host's memory when they are offloaded.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2f_core.train.memory import TOGETHER

MOMENTS = ("exp_avg", "exp_avg_sq")


class Partition(NamedTuple):
    """What a worker holds of one tensor."""

    kind: str
    name: str
    parameter: nn.Parameter
    local: Tensor


def trained_parameters(engine: Any) -> dict[str, nn.Parameter]:
    """Name -> parameter, for all that are trained, in the module's order."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def is_whole(engine: Any, parameter: nn.Parameter) -> bool:
    """Whether every worker computes with the whole fp32 weight itself."""
    return engine.zero_optimization_stage() < 3 and parameter.dtype == torch.float32


def local_partition(engine: Any, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
    """This worker's share of the fp32 weight, or of one of its moments: the very numbers that train.

    Flat above stage 0. No other worker is asked.
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
    """(kind, name, whole tensor) of each, of the parameter's shape, out of all workers' shares above stage 0.

    `TOGETHER` elements, or one larger tensor, are exchanged at a time: a collective takes longer to begin than to move
    a small tensor, and an adapter has thousands. A tensor may be a view of all that came with it. Every worker must
    call it, with the same parameters in the same order, and go through it to the end.
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
    """All of the group by one collective."""
    shapes = [whole_shape(part.parameter) for part in group]
    if engine.zero_optimization_stage() == 3:
        mine = torch.cat([part.local.to(engine.device) for part in group])
        gathered = torch.empty(dist.get_world_size() * mine.numel(), device=engine.device)
        dist.all_gather_into_tensor(gathered, mine)
        del mine
        columns = gathered.view(dist.get_world_size(), -1).split([part.local.numel() for part in group], dim=1)
        wholes = (each.flatten()[: shape.numel()] for each, shape in zip(columns, shapes, strict=True))
    else:
        # Added up as integers, because -0.0 + 0.0 is another zero: its hash would not be that of the checkpoint.
        counts = [shape.numel() for shape in shapes]
        bits = torch.zeros(sum(counts), dtype=torch.int32, device=engine.device)
        for part, whole in zip(group, bits.split(counts), strict=True):
            partition_of(engine, part.parameter, whole).copy_(part.local.view(torch.int32))
        dist.all_reduce(bits)
        wholes = iter(bits.view(torch.float32).split(counts))
    for part, shape, whole in zip(group, shapes, wholes, strict=True):
        yield part.kind, part.name, whole.view(shape)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter; stage 3 leaves an empty one behind."""
    return cast(torch.Size, getattr(parameter, "ds_shape", parameter.shape))


def write(engine: Any, parameter: nn.Parameter, whole: Tensor, moment: str | None = None) -> None:
    """Set the fp32 weight, or one of its moments, from the whole tensor; each worker keeps its share."""
    local_partition(engine, parameter, moment).copy_(partition_of(engine, parameter, whole))


def inner_optimizer(engine: Any) -> Any:
    """The optimizer that DeepSpeed's own one wraps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def moments_exist(engine: Any) -> bool:
    return any(MOMENTS[0] in state for state in inner_optimizer(engine).state.values())
