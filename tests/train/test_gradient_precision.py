"""Gradients of many micro-batches, summed and exchanged by every ZeRO stage, against their sum in float64."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2f_core.train import partitions, zero
from d2f_core.train.config import TrainConfig
from tests.slow import slow
from tests.train.processes import Workers

WORKERS, PARTS, SAMPLES = 2, 128, 4
CASES = [(stage, precision) for precision in ("fp32", "same") for stage in (1, 2, 3)]
OFFLOADED = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer_and_weights")]


def network() -> nn.Module:
    """Odd sizes, which two workers cannot halve, and a frozen parameter, as in a LoRA training."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(33, 64), nn.Tanh(), nn.Linear(64, 9))
    module[0].bias.requires_grad_(False)
    return module


def loss(model: Any, number: int) -> Tensor:
    x = torch.randn(SAMPLES, 33, generator=torch.Generator().manual_seed(number)).bfloat16()
    return model(x).float().square().mean()


def exact() -> Tensor:
    """The mean gradient over all workers' micro-batches, each computed in bf16, added up in float64."""
    module = network().bfloat16()
    trained = [p for p in module.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64)
    for number in range(WORKERS * PARTS):
        gradients = torch.autograd.grad(loss(module, number) / PARTS, trained)
        total += torch.cat([gradient.flatten() for gradient in gradients]).double() / WORKERS
    return total


def summed(rank: int, stage: int, gradient_precision: str, offload: str = "none") -> Tensor:
    """What the optimizer is given for one step: the whole gradient, flat."""
    options: dict[str, Any] = {"zero_stage": stage, "gradient_precision": gradient_precision, "offload": offload}
    config = TrainConfig(
        **options, precision="bf16", global_batch_size=WORKERS * PARTS * SAMPLES, micro_batch_size=SAMPLES,
        num_workers=WORKERS, clip_grad_norm=0, optimizer="adamw" if offload == "none" else "cpu_adamw",
    )  # fmt: skip
    engine = zero.build_engine(network(), config, WORKERS)
    found: list[Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found.extend(p.grad.flatten().clone() for group in optimizer.param_groups for p in group["params"])

    partitions.inner_optimizer(engine).register_step_pre_hook(keep)
    for part in range(PARTS):
        engine.backward(loss(engine, part * WORKERS + rank))
        engine.step()
    parts: list[Any] = [None] * WORKERS
    dist.all_gather_object(parts, torch.cat(found))
    if stage < 3:
        return torch.cat(parts)
    whole = []
    for parameter in partitions.trained_parameters(engine).values():
        count = partitions.whole_shape(parameter).numel()
        share = math.ceil(count / WORKERS)
        whole.append(torch.cat([part[:share] for part in parts])[:count])
        parts = [part[share:] for part in parts]
    return torch.cat(whole)


def errors(rank: int, cases: list[tuple]) -> dict[tuple, float]:
    """By case, the length of what is wrong with the gradient, relative to the gradient's."""
    truth, found = exact(), {}
    for case in cases:
        gradient = summed(rank, *case).double()[: len(truth)]
        found[case] = float((gradient - truth).norm() / truth.norm())
    return found


@pytest.fixture(scope="module")
def measured(pair: Workers) -> dict[tuple, float]:
    return pair.run(errors, CASES)[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_of_128_micro_batches_and_two_workers_are_summed_without_loss(measured, stage: int):
    assert measured[stage, "fp32"] < 1e-6


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sums_in_the_dtype_of_the_passes_are_had_where_they_are_asked_for(measured, stage: int):
    assert 3e-3 < measured[stage, "same"] < 3e-2


@slow("4 minutes, of which 3 compile DeepSpeed's CPU AdamW; the same without offload stays")
@pytest.mark.timeout(900)  # for the compiler
def test_offloaded_gradients_are_summed_in_the_same_way(offloading_pair: Workers):
    found = offloading_pair.run(errors, [(stage, "fp32", offload) for stage, offload in OFFLOADED])[0]
    assert max(found.values()) < 1e-6
