"""What each worker holds of the fp32 weights and moments, and the way from it to whole tensors and back.

The only module that knows how DeepSpeed lays parameters out:

| stage | a worker's share of a parameter                                                                       |
|-------|-------------------------------------------------------------------------------------------------------|
| 0     | all of it                                                                                             |
| 1, 2  | all parameters, end to end, are cut into equal parts: one stretch of the flattened parameter, or none |
| 3     | each flattened parameter is cut into equal parts by itself; the last ones are padded                  |

The fp32 numbers of a share lie in the host's memory when they are offloaded.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def trained_parameters(engine: Any) -> dict[str, nn.Parameter]:
    """Name -> parameter, for all that are trained, in the module's order."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def is_whole(engine: Any, parameter: nn.Parameter) -> bool:
    """Whether every worker computes with the whole fp32 weight itself."""
    return engine.zero_optimization_stage() < 3 and parameter.dtype == torch.float32


def held(engine: Any, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
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


def cut(engine: Any, parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """This worker's share of `whole`, a tensor of the parameter's shape, laid out like `held`."""
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


def join(engine: Any, parameter: nn.Parameter, share: Tensor) -> Tensor:
    """The whole tensor, of the parameter's shape, out of all workers' shares.

    Every worker must call it, for every parameter in the same order.
    """
    stage = engine.zero_optimization_stage()
    if not stage:
        return share
    shape = cast(torch.Size, getattr(parameter, "ds_shape", parameter.shape))
    share = share.to(engine.device)
    if stage == 3:
        parts = torch.empty(share.numel() * dist.get_world_size(), device=engine.device)
        dist.all_gather_into_tensor(parts, share)
        return parts[: shape.numel()].view(shape)
    # Added up as integers, because -0.0 + 0.0 is another zero: its hash would not be that of the checkpoint.
    bits = torch.zeros(shape.numel(), dtype=torch.int32, device=engine.device)
    cut(engine, parameter, bits).copy_(share.view(torch.int32))
    dist.all_reduce(bits)
    return bits.view(torch.float32).view(shape)


def read_weight(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The fp32 weight, whole. Every worker must call it, for every parameter in the same order."""
    if is_whole(engine, parameter):
        return parameter.detach()
    return join(engine, parameter, held(engine, parameter))


def read_moment(engine: Any, parameter: nn.Parameter, name: str) -> Tensor:
    """One of `MOMENTS`, fp32, whole. Every worker must call it, for every parameter in the same order."""
    if not moments_exist(engine):  # no step was applied yet, which under fp16 may last some steps
        return torch.zeros(getattr(parameter, "ds_shape", parameter.shape), device=engine.device)
    return join(engine, parameter, held(engine, parameter, name))


def write(engine: Any, parameter: nn.Parameter, whole: Tensor, moment: str | None = None) -> None:
    """Set the fp32 weight, or one of its moments, from the whole tensor; each worker keeps its share."""
    held(engine, parameter, moment).copy_(cut(engine, parameter, whole))


def inner_optimizer(engine: Any) -> Any:
    """The optimizer that DeepSpeed's own one wraps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def moments_exist(engine: Any) -> bool:
    return any(MOMENTS[0] in state for state in inner_optimizer(engine).state.values())
