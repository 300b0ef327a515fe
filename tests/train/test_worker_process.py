"""What a training's worker sets in its process before its model is built."""

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from d2f_core.train import determinism, worker
from d2f_core.train.config import TrainConfig
from tests.slow import slow
from tests.train.processes import Workers


class BuiltError(Exception):
    """Ends the worker where its model would be built."""


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[TrainConfig], dict[str, Any]]]:
    """Runs a worker as Ray Train would, and returns what holds when it builds its model; undone at the end."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    monkeypatch.delenv(determinism.WORKSPACE, raising=False)
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 2)
    monkeypatch.setattr(worker.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(worker.ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(worker, "Heartbeat", lambda *_: SimpleNamespace(doing=lambda what: None))
    monkeypatch.setattr(worker, "_show_log", lambda: None)
    found: dict[str, Any] = {}

    def build_task(device: str) -> None:
        found["threads"] = torch.get_num_threads()
        found["algorithms"] = torch.are_deterministic_algorithms_enabled()
        found["cudnn"] = cudnn.deterministic, cudnn.benchmark
        found["cublas"] = os.environ.get(determinism.WORKSPACE)
        raise BuiltError

    def run(config: TrainConfig) -> dict[str, Any]:
        with pytest.raises(BuiltError):
            worker.run_worker(cast(Any, SimpleNamespace(config=config, build_task=build_task, pulse=None)))
        return found

    yield run
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, cudnn.benchmark = before


def test_a_deterministic_training_sets_every_switch_before_it_builds_its_model(settings):
    torch.backends.cudnn.benchmark = True
    found = settings(TrainConfig(deterministic=True))
    assert found["algorithms"] and found["cudnn"] == (True, False) and found["cublas"] == ":4096:8"


def test_no_switch_is_set_unasked(settings):
    found = settings(TrainConfig())
    assert not found["algorithms"] and not found["cudnn"][0] and found["cublas"] is None


def test_a_workspace_that_is_not_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(determinism.WORKSPACE, ":0:0")
    with pytest.raises(ValueError, match=r"CUBLAS_WORKSPACE_CONFIG=':0:0' lets cuBLAS add up in any order"):
        determinism.use_deterministic_algorithms()
    assert not torch.are_deterministic_algorithms_enabled()


OFFLOAD: dict[str, Any] = {"use_gpu": True, "offload": "optimizer", "optimizer": "cpu_adamw"}


@pytest.mark.parametrize(
    ("config", "threads"),
    [
        (TrainConfig(threads_per_worker=3), 3),
        (TrainConfig(**OFFLOAD, threads_per_worker=3), 3),
        (TrainConfig(**OFFLOAD, cpus_per_worker=4), 4),
    ],
)
def test_torchs_threads_which_step_offloaded_moments_are_those_asked_for(settings, config: TrainConfig, threads: int):
    torch.set_num_threads(1)  # as in a worker that reserves one CPU
    assert settings(config)["threads"] == threads


def cpu_adam_threads(rank: int) -> int:
    """Threads of this process more after DeepSpeed's CPU AdamW has stepped once with three of torch's."""
    from d2f_core.train import zero

    parameter = torch.nn.Parameter(torch.zeros(10**6))
    parameter.grad = torch.ones(10**6)
    optimizer = zero._build_optimizer([parameter], TrainConfig(optimizer="cpu_adamw", offload="optimizer"))
    before = len(os.listdir("/proc/self/task"))
    torch.set_num_threads(3)
    optimizer.step()
    torch.set_num_threads(1)
    return len(os.listdir("/proc/self/task")) - before


@slow("3 minutes, which compile DeepSpeed's CPU AdamW; that torch's threads are set is shown without")
@pytest.mark.timeout(900)  # for the compiler
def test_deepspeeds_cpu_adamw_steps_with_torchs_threads(offloading_single: Workers):
    assert offloading_single.run(cpu_adam_threads) == [2]
