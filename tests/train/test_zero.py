"""Averages of the weights under every ZeRO stage, on two processes, against one plain torch process."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from d2f_core.model import ema
from d2f_core.model.ema import EmaConfig
from d2f_core.train import zero
from d2f_core.train.config import TrainConfig
from d2f_core.train.worker import Worker

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


class Job:
    """What a `Worker` reads of its job here."""

    def __init__(self, stage: int) -> None:
        self.config = config(stage)


def train(rank: int, port: int, directory: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS), "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)
    for stage in range(4):
        engine = zero.build_engine(network(), config(stage), WORKERS)
        worker = Worker(Job(stage), None, engine, rank, WORKERS)  # type: ignore[arg-type]
        worker.update_averages(0)
        for step in range(STEPS):
            zero.set_learning_rate(engine, 1e-2)
            engine.backward(engine(batch(step)[rank * 4 : rank * 4 + 4]).square().mean())
            engine.step()
            worker.update_averages(step + 1)
        averages = worker.evaluation_weights()
        with torch.no_grad(), zero.swapped_weights(engine, averages):
            swapped = engine(batch(99))
        after = {name: zero.read_weight(engine, p).clone() for name, p in zero.trained_parameters(engine).items()}
        if rank == 0:
            torch.save({"averages": averages, "swapped": swapped, "after": after}, Path(directory, f"{stage}.pt"))
        dist.barrier()
    dist.destroy_process_group()


def plain() -> dict[str, object]:
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
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(averages[name])
        return {"averages": averages, "swapped": module(batch(99)), "after": after}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("zero")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(train, args=(port, str(directory)), nprocs=WORKERS, start_method="spawn")
    return directory


@pytest.mark.parametrize("stage", range(4))
def test_averages_equal_those_of_one_plain_process(results: Path, stage: int):
    found, expected = torch.load(results / f"{stage}.pt", weights_only=True), plain()
    for name in ("averages", "after"):
        assert found[name].keys() == expected[name].keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
