"""Averages of the weights under every ZeRO stage, on two processes, against one plain torch process.

And what an engine is refused for before it is built.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from d2f_core.model import ema
from d2f_core.model.ema import EmaConfig
from d2f_core.train import zero
from d2f_core.train.config import MissingCompilerError, TrainConfig
from d2f_core.train.worker import Worker
from tests.train import processes

STEPS, WORKERS = 4, 2
EMA = EmaConfig(decay=0.9, start_step=1)


def config(stage: int) -> TrainConfig:
    return TrainConfig(
        num_steps=STEPS, global_batch_size=8, micro_batch_size=4, num_workers=WORKERS, zero_stage=stage,  # type: ignore[arg-type]
        learning_rate=1e-2, ema=EMA,
    )  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    module[0].bias.requires_grad_(False)  # as in a LoRA training, some parameters are frozen
    return module


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step))


def train(rank: int, port: int, directory: str) -> None:
    processes.join(rank, WORKERS, port)
    for stage in range(4):
        engine = zero.build_engine(network(), config(stage), WORKERS)
        worker = Worker(config(stage), engine, rank, WORKERS)
        worker.update_averages(0)
        for step in range(STEPS):
            zero.set_learning_rate(engine, 1e-2)
            engine.backward(engine(batch(step)[rank * 4 : rank * 4 + 4]).square().mean())
            engine.step()
            worker.update_averages(step + 1)
        shares: list[dict[str, torch.Tensor]] = [{} for _ in range(WORKERS)]
        dist.all_gather_object(shares, worker.averages)
        averages = {name: tensor for share in shares for name, tensor in share.items()}
        after = {name: zero.read_weight(engine, p).clone() for name, p in zero.trained_parameters(engine).items()}
        if rank == 0:
            torch.save({"averages": averages, "after": after}, Path(directory, f"{stage}.pt"))
        dist.barrier()
    dist.destroy_process_group()


def plain() -> dict[str, Any]:
    module = network()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    averages = {name: p.detach().clone() for name, p in trained.items()}
    for step in range(STEPS):
        loss = module(batch(step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        for name, parameter in trained.items():
            ema.update(averages[name], parameter.detach(), EMA.decay_at(step + 1))
    after = {name: p.detach().clone() for name, p in trained.items()}
    return {"averages": averages, "after": after}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("zero")
    processes.start(train, WORKERS, str(directory))
    return directory


@pytest.mark.parametrize("stage", range(4))
def test_averages_equal_those_of_one_plain_process(results: Path, stage: int):
    found, expected = torch.load(results / f"{stage}.pt", weights_only=True), plain()
    for name in ("averages", "after"):
        assert found[name].keys() == expected[name].keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def wait_for_a_worker_that_stands_still(rank: int, port: int, directory: str) -> None:
    processes.join(rank, WORKERS, port)
    engine = zero.build_engine(network(), dataclasses.replace(config(2), worker_timeout_seconds=2), WORKERS)
    if rank:
        time.sleep(8)
        return
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.zeros(1), group=engine.optimizer.dp_process_group)
    Path(directory, "waited").write_text(str(time.monotonic() - began))


def test_deepspeeds_own_group_waits_no_longer_than_asked(tmp_path: Path):
    processes.start(wait_for_a_worker_that_stands_still, WORKERS, str(tmp_path))
    assert 1 < float((tmp_path / "waited").read_text()) < 6


@pytest.mark.parametrize("adapted", [False, True])
def test_activation_checkpointing_runs_the_blocks_of_a_unet_twice_also_inside_its_adapters(adapted: bool):
    from diffusers import UNet2DConditionModel

    from d2f_core.model.lora import LoraConfig, add_lora

    unet = UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=4, attention_head_dim=2,
    )  # fmt: skip
    module = add_lora(unet, LoraConfig(rank=2)) if adapted else unet
    calls = []
    unet.get_submodule("down_blocks.0.resnets.0").register_forward_pre_hook(lambda *_: calls.append(1))
    zero.enable_activation_checkpointing(module)
    output = module(torch.randn(1, 2, 4, 4), torch.tensor([5.0]), encoder_hidden_states=torch.randn(1, 3, 4)).sample
    output.square().mean().backward()
    assert len(calls) == 2


def test_activation_checkpointing_needs_a_module_that_has_it():
    with pytest.raises(ValueError, match="Linear has no method enable_gradient_checkpointing"):
        zero.enable_activation_checkpointing(nn.Linear(1, 1))


def test_an_optimizer_that_cannot_be_compiled_here_is_named_by_the_worker(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MissingCompilerError, match="cannot be found there"):
        zero.build_engine(nn.Linear(1, 1), TrainConfig(optimizer="cpu_adamw", offload="optimizer"), 1)
