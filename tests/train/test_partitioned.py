"""ZeRO 3 with parameters that are really partitioned, and losses of two forwards, against one plain torch process.

DeepSpeed keeps parameters of fewer than 1e5 elements whole, which all of a test's are, unless it is told not to.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2f_core.train import partitions, zero
from d2f_core.train.config import EmaConfig, TrainConfig
from d2f_core.train.worker_state import Worker
from tests.train.processes import Workers

WORKERS, STEPS, PARTS, SAMPLES, RATE = 2, 3, 2, 2, 1e-2
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-4  # a hundredth of a step: AdamW divides a gradient near 0 by its own size


def unet(recompute: bool) -> nn.Module:
    """A UNet with a LoRA of which no factor is zero, as after some training."""
    from diffusers import UNet2DConditionModel

    from d2f_core.model.config import LoraConfig
    from d2f_core.model.lora import add_lora

    torch.manual_seed(0)
    plain = UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=4, attention_head_dim=2,
    )  # fmt: skip
    module = add_lora(plain, LoraConfig(rank=2))
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    if recompute:
        zero.enable_activation_checkpointing(module)
    return module


def unet_loss(model: Any, number: int, samples: slice) -> Tensor:
    draw = torch.Generator().manual_seed(number)
    x, states = torch.randn(8, 2, 4, 4, generator=draw), torch.randn(8, 3, 4, generator=draw)
    times = 999 * torch.rand(8, generator=draw)
    output = model(x[samples], times[samples], encoder_hidden_states=states[samples]).sample
    return (output - x[samples]).square().mean()


def linear(recompute: bool) -> nn.Module:
    del recompute
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def two_forwards_loss(model: Any, number: int, samples: slice) -> Tensor:
    """Of two passes through the network, as of a pair of images or of self-conditioning."""
    x = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(number))
    return (model(x[0, samples]) - 2 * model(x[1, samples])).square().mean()


TASKS: dict[str, tuple[Callable[[bool], nn.Module], Callable[[Any, int, slice], Tensor]]] = {
    "unet": (unet, unet_loss),
    "two forwards": (linear, two_forwards_loss),
}
CASES = [("unet", 3, False), ("unet", 3, True), *(("two forwards", stage, False) for stage in (1, 2, 3))]


def unlimited(*arguments: Any) -> dict[str, Any]:
    """The engine's config, under which no parameter is too small to be partitioned."""
    config = ENGINE_CONFIG(*arguments)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


ENGINE_CONFIG = zero.engine_config


def train(rank: int, task: str, stage: int, recompute: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"zero_stage": stage}
    config = TrainConfig(
        **options, global_batch_size=WORKERS * PARTS * SAMPLES, micro_batch_size=SAMPLES, num_workers=WORKERS,
        learning_rate=RATE, ema=EmaConfig(decay=0.0), activation_checkpointing=recompute,
    )  # fmt: skip
    build, loss_fn = TASKS[task]
    with mock.patch.object(zero, "engine_config", unlimited):
        engine = zero.build_engine(build(recompute), config, WORKERS)
    losses, gathered = [], []
    for step in range(STEPS):
        total = torch.zeros(())
        for part in range(PARTS):
            first = (part * WORKERS + rank) * SAMPLES
            loss = loss_fn(engine, step, slice(first, first + SAMPLES))
            engine.backward(loss)
            gathered.append(sum(p.numel() for p in engine.module.parameters()))
            engine.step()
            total += loss.detach() / PARTS / WORKERS
        dist.all_reduce(total)
        losses.append(float(total))
    parts: list[dict[str, Tensor]] = [{} for _ in range(WORKERS)]
    worker = Worker(config, engine, rank, WORKERS)
    owned = {name: tensor.clone() for kind, name, tensor in worker.owned() if kind == "weights"}
    dist.all_gather_object(parts, owned)
    weights = {name: tensor for part in parts for name, tensor in part.items()}
    trained = partitions.trained_parameters(engine)
    held = {name: partitions.local_partition(engine, parameter).numel() for name, parameter in trained.items()}
    return {"losses": losses, "gathered": gathered, "weights": weights, "held": held}


def train_all(rank: int) -> dict[str, dict[str, Any]]:
    return {str(case): train(rank, *case) for case in CASES}


def plain(task: str) -> tuple[list[float], dict[str, Tensor]]:
    build, loss_fn = TASKS[task]
    module, losses = build(False), []
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(STEPS):
        loss = loss_fn(module, step, slice(None))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in trained.items()}


@pytest.fixture(scope="module")
def results(pair: Workers) -> dict[str, dict[str, Any]]:
    return pair.run(train_all)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_weights_equal_those_of_one_plain_process(results, case: tuple[str, int, bool]):
    losses, weights = plain(case[0])
    found = results[str(case)]
    assert found["losses"] == pytest.approx(losses, rel=0, abs=LOSS_TOLERANCE)
    torch.testing.assert_close(found["weights"], weights, rtol=0, atol=WEIGHT_TOLERANCE)


@pytest.mark.parametrize("recompute", [False, True])
def test_stage_3_partitions_every_parameter_and_leaves_none_gathered_after_a_backward_pass(results, recompute: bool):
    found = results[str(("unet", 3, recompute))]
    assert found["gathered"] == [0] * STEPS * PARTS
    for name, weight in found["weights"].items():
        assert found["held"][name] == -(-weight.numel() // WORKERS)


def test_recomputed_activations_change_no_bit(results):
    again, kept = (results[str(("unet", 3, recompute))] for recompute in (True, False))
    assert again["losses"] == kept["losses"]
    torch.testing.assert_close(again["weights"], kept["weights"], rtol=0, atol=0)
