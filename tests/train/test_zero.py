"""Averages of the weights under every ZeRO stage, on two processes, against one plain torch process.

And what an engine is refused for before it is built.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from d2f_core.train import ema, partitions, zero
from d2f_core.train.compiler import MissingCompilerError
from d2f_core.train.config import EmaConfig, TrainConfig
from d2f_core.train.worker_state import Worker
from tests.slow import slow
from tests.train.processes import Workers

STEPS, WORKERS = 4, 2
EMA = EmaConfig(decay=0.9, start_step=1)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ENGINES = [(0, "fp32"), *((stage, precision) for stage in (1, 2, 3) for precision in DTYPES)]
OFFLOADED = [(1, "bf16", "optimizer"), (2, "fp32", "optimizer"), (3, "bf16", "optimizer_and_weights")]


def config(stage: int, precision: str = "fp32", offload: str = "none") -> TrainConfig:
    options: dict[str, Any] = {"zero_stage": stage, "precision": precision, "offload": offload}
    return TrainConfig(
        **options, num_steps=STEPS, global_batch_size=8, micro_batch_size=4, num_workers=WORKERS, learning_rate=1e-2,
        ema=EMA, optimizer="adamw" if offload == "none" else "cpu_adamw",
        use_gpu=precision == "fp16",  # fp16 is for GPUs; the processes here compute it on the CPU
    )  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    module[0].bias.requires_grad_(False)  # as in a LoRA training, some parameters are frozen
    return module


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step))


class Exchanges(TorchDispatchMode):
    """Counts the collectives within, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def whole(worker: Worker, kind: str) -> dict[str, torch.Tensor]:
    """All parameters' tensors of one kind, from what every worker saves."""
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(WORKERS)]
    dist.all_gather_object(parts, {name: tensor.clone() for found, name, tensor in worker.owned() if found == kind})
    return {name: tensor for part in parts for name, tensor in part.items()}


def kept(worker: Worker, wholes: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The elements of whole averages that a worker keeps."""
    for index, (name, parameter) in enumerate(partitions.trained_parameters(worker.engine).items()):
        where = worker.spread("ema", index, parameter, reader=0)
        yield name, wholes[name].flatten()[where.starts[worker.rank] :][: where.counts[worker.rank]]


def follow(worker: Worker, expected: dict[str, torch.Tensor], step: int) -> list[str]:
    """Update the averages, also plain ones of whole weights; names of the collectives of the first."""
    with Exchanges() as seen:
        worker.update_averages(step)
    for name, weight in whole(worker, "weights").items():
        ema.update(expected.setdefault(name, weight), weight, EMA.decay_at(step))
    return seen.names


def train(rank: int, stage: int, precision: str, offload: str = "none") -> dict[str, Any]:
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed refuses CPUs without fp16 arithmetic; torch computes it on any.
    cast(Any, get_accelerator()).is_fp16_supported = lambda: True
    settings = config(stage, precision, offload)
    engine = zero.build_engine(network(), settings, WORKERS)
    worker = Worker(settings, engine, rank, WORKERS)
    expected: dict[str, torch.Tensor] = {}
    exchanges = follow(worker, expected, 0)
    for step in range(STEPS):
        zero.set_learning_rate(engine, 1e-2)
        x = batch(step)[rank * 4 : rank * 4 + 4].to(DTYPES[precision])
        engine.backward(engine(x).float().square().mean())
        engine.step()
        exchanges += follow(worker, expected, step + 1)
    with Exchanges() as seen:
        averages = whole(worker, "ema")
    parts, worker.averages = worker.averages, {}
    worker.restore_averages(kept(worker, averages))
    return {
        "averages": averages, "after": whole(worker, "weights"), "expected": expected, "exchanges": exchanges,
        "counted": seen.names, "parts": parts, "restored": whole(worker, "ema"),
    }  # fmt: skip


def train_all(rank: int, engines: list[tuple]) -> dict[tuple, dict[str, Any]]:
    return {engine: train(rank, *engine) for engine in engines}


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
def results(pair: Workers) -> list[dict[tuple, dict[str, Any]]]:
    return pair.run(train_all, ENGINES)


def check_averages(results: list[dict[tuple, dict[str, Any]]], engine: tuple) -> None:
    """They have the bits of plain ones of the whole weights, in memory, gathered, and restored."""
    for found in (result[engine] for result in results):
        assert found["averages"].keys() == plain()["averages"].keys()
        for name in ("averages", "restored"):
            torch.testing.assert_close(found[name], found["expected"], rtol=0, atol=0)
        assert not found["exchanges"] and found["counted"]
    kept = sum(part.numel() for result in results for part in result[engine]["parts"].values())
    padded = kept - sum(tensor.numel() for tensor in plain()["averages"].values())
    assert 0 <= padded <= (3 if engine[0] == 3 else 0)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_averages_are_kept_without_a_collective_and_are_those_of_the_whole_weights(results, engine: tuple):
    check_averages(results, engine)


@pytest.mark.parametrize("stage", range(4))
def test_averages_equal_those_of_one_plain_process(results, stage: int):
    found, expected = results[0][stage, "fp32"], plain()
    torch.testing.assert_close({name: found[name] for name in expected}, expected, rtol=0, atol=1e-6)


@slow("4 minutes, of which 3 compile DeepSpeed's CPU AdamW; the same without offload stays")
@pytest.mark.timeout(900)  # for the compiler
def test_averages_of_offloaded_weights_are_kept_in_the_same_way(offloading_pair: Workers):
    results = offloading_pair.run(train_all, OFFLOADED)
    for engine in OFFLOADED:
        check_averages(results, engine)


def has_loaded_compiler(rank: int) -> bool:
    return "torch._inductor.compile_fx" in sys.modules


def test_no_engine_loads_torchs_compiler_which_takes_seconds(results, pair: Workers):
    assert pair.run(has_loaded_compiler) == [False, False]


def signs_of_zeros(rank: int) -> list[bool]:
    """Of the tensors that worker 0 gathers."""
    found: list[torch.Tensor] = []
    for stage, precision in ENGINES:
        engine = zero.build_engine(network(), config(stage, precision), WORKERS)
        parameters = partitions.trained_parameters(engine)
        for parameter in parameters.values():
            partitions.write(engine, parameter, -torch.zeros(partitions.whole_shape(parameter)))
        if stage:
            parts = [
                partitions.Partition("weights", name, p, partitions.local_partition(engine, p), owner=0)
                for name, p in parameters.items()
            ]
            found += [(read == 0).all() and read.signbit().all() for *_, read in partitions.gather(engine, parts)]
    return [bool(one) for one in found]


def test_a_negative_zero_stays_one(pair: Workers):
    assert all(pair.run(signs_of_zeros)[0])


def wait_for_a_worker_that_stands_still(rank: int, directory: str) -> float:
    engine = zero.build_engine(network(), dataclasses.replace(config(2), worker_timeout_seconds=2), WORKERS)
    began, done = time.monotonic(), Path(directory, "done")
    if rank:
        while not done.exists() and time.monotonic() < began + 8:
            time.sleep(0.1)
        return 0.0
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.zeros(1), group=engine.optimizer.dp_process_group)
    done.touch()
    return time.monotonic() - began


def test_deepspeeds_own_group_waits_no_longer_than_asked(pair: Workers, tmp_path: Path):
    waited = pair.run(wait_for_a_worker_that_stands_still, str(tmp_path))[0]
    pair.close()  # their group is of no use any more
    assert 1 < waited < 6


@pytest.mark.parametrize("adapted", [False, True])
def test_activation_checkpointing_runs_the_blocks_of_a_unet_twice_also_inside_its_adapters(adapted: bool):
    from diffusers import UNet2DConditionModel

    from d2f_core.model.config import LoraConfig
    from d2f_core.model.lora import add_lora

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


@pytest.mark.parametrize(
    ("offload", "parts"),
    [("none", set()), ("optimizer", {"optimizer"}), ("optimizer_and_weights", {"optimizer", "param"})],
)
def test_what_is_offloaded_is_told_to_deepspeed(offload: str, parts: set[str]):
    found = zero.engine_config(config(3, "bf16", offload), WORKERS, trained=10)
    told = {name for name in found["zero_optimization"] if name.startswith("offload_")}
    assert told == {f"offload_{part}" for part in parts}
    assert all(found["zero_optimization"][name] == {"device": "cpu", "pin_memory": False} for name in told)
    assert found["zero_optimization"]["reduce_bucket_size"] == 10 and found["gradient_accumulation_steps"] == 1


def test_an_optimizer_whose_first_batch_is_not_finite_cannot_be_restored_and_the_fix_is_named():
    module = nn.Linear(1, 1)
    engine = SimpleNamespace(
        module=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=1.0),
        skipped_steps=0,
        gradient_accumulation_steps=lambda: 1,
        backward=lambda loss: loss.backward(),
        step=lambda: None,  # DeepSpeed leaves a step out whose gradient is not finite
    )
    with pytest.raises(
        zero.NonFiniteGradientError, match=r"first batch, .* not finite, .* resume with precision='fp32'"
    ):
        zero.restore_moments(engine, [], 3, lambda: module(torch.full((1, 1), torch.inf)).sum())
