"""A run goes on from its checkpoints on another number of workers, and at another ZeRO stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

from d2f_core.model.config import LoraConfig
from d2f_core.model.lora import add_lora
from d2f_core.train import restore, zero
from d2f_core.train.checkpoint import KINDS, read_tensors
from d2f_core.train.checkpoint_writer import CheckpointWriter
from d2f_core.train.config import EmaConfig, TrainConfig
from d2f_core.train.retention_rules import Retention
from d2f_core.train.task import Task
from d2f_core.train.worker_state import Worker
from tests.slow import slow
from tests.train.processes import Workers

STEPS, MICRO, BATCH = 3, 4, 8
"""Of each leg; rows of a micro-batch, and of a step."""
CHAINS = {
    "2-1-2 workers at stage 2": ((2, 2), (1, 2), (2, 2)),
    "2-1-2 workers at stage 3": ((2, 3), (1, 3), (2, 3)),
    "stages 1-2-3": ((2, 1), (2, 2), (2, 3)),
    "2-1-2 workers at stages 0-2-0": ((2, 0), (1, 2), (2, 0)),
}
"""Each leg's number of workers and ZeRO stage."""


@dataclass(frozen=True)
class Case:
    chain: str
    lora: bool
    precision: str
    offloaded: bool = False

    def __str__(self) -> str:
        offloaded = ", offloaded" if self.offloaded else ""
        return f"{self.chain}, {'LoRA' if self.lora else 'full'}, {self.precision}{offloaded}"

    def config(self, leg: int) -> TrainConfig:
        workers, stage = CHAINS[self.chain][leg]
        where = "optimizer_and_weights" if stage == 3 else "optimizer"
        options: dict[str, Any] = {"zero_stage": stage, "precision": self.precision}
        if self.offloaded:
            options |= {"offload": where, "optimizer": "cpu_adamw"}
        return TrainConfig(
            **options, num_workers=workers, global_batch_size=BATCH, micro_batch_size=MICRO, learning_rate=1e-2,
            weight_decay=0.1, ema=EmaConfig(decay=0.9),
        )  # fmt: skip


CASES = [
    Case(chain, lora, precision)
    for chain, legs in CHAINS.items()
    for lora in (False, True)
    for precision in ("fp32", "bf16")
    if precision == "fp32" or all(stage for _, stage in legs)
]
OFFLOADED = [
    Case(case.chain, case.lora, case.precision, offloaded=True)
    for case in CASES
    if all(stage for _, stage in CHAINS[case.chain])
]


class Attention(nn.Module):
    """Odd sizes, which two workers cannot halve."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_v = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_v(torch.tanh(self.to_q(x)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"attn1": Attention()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block["attn1"](x)


def task(case: Case) -> Task:
    torch.manual_seed(0)
    module: Any = Network()
    if case.lora:
        module = add_lora(module, LoraConfig(rank=3, targets="attention"))
    dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
    return Task(
        module=module,
        to_batch=lambda rows: cast(Any, rows).to(dtype),
        loss_fn=lambda network, x: cast(torch.Tensor, network(x)).float().square().mean(dim=1),
    )


def rows(step: int, part: int) -> Any:
    return torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step))[MICRO * part :][:MICRO]


def train(worker: Worker, task: Task, steps: range) -> list[float]:
    """The mean loss of each step over all workers."""
    losses = []
    for step in steps:
        zero.set_learning_rate(worker.engine, 1e-2)
        total = torch.zeros(())
        for part in range(worker.rank, BATCH // MICRO, worker.num_workers):
            loss = task.loss_fn(worker.engine, task.to_batch(rows(step, part))).mean()
            worker.engine.backward(loss)
            worker.engine.step()
            total += loss.detach() * MICRO / BATCH
        worker.update_averages(step + 1)
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


def save(worker: Worker, output: str, leg: int) -> None:
    writer = CheckpointWriter(output, f"leg-{leg}", worker.rank, worker.num_workers, Retention(keep_last=9))
    step = STEPS * (leg + 1)
    state = {"engine": zero.engine_state(worker.engine)}
    writer.save(step, samples=BATCH * step, identity="run", tensors=worker.share(), state=state)
    writer.wait()
    writer.close()


def owned(worker: Worker) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in KINDS}
    for kind, name, tensor in worker.owned():
        found[kind][name] = tensor.clone()
    return found


def run_leg(rank: int, case: Case, leg: int, output: str) -> dict[str, Any]:
    config, made = case.config(leg), task(case)
    found = restore.choose(output, "run", made.module, "cpu")
    worker = Worker(config, zero.build_engine(made.module, config, config.num_workers), rank, config.num_workers)
    result: dict[str, Any] = {}
    if found:
        assert found.manifest.step == STEPS * leg
        restore.put_back(worker, made, found, rows(0, rank))
        result["saved"] = {kind: read_tensors(found, kind) for kind in KINDS}
        result["restored"] = owned(worker)
    else:
        worker.update_averages(0)
    result["losses"] = train(worker, made, range(STEPS * leg, STEPS * (leg + 1)))
    save(worker, output, leg)
    if not leg:
        result["unbroken"] = train(worker, made, range(STEPS, STEPS * 3))
    result["end"] = owned(worker)
    return result


def run_legs(rank: int, cases: dict[str, Case], leg: int) -> dict[Case, dict[str, Any]]:
    return {case: run_leg(rank, case, leg, output) for output, case in cases.items()}


def run_chains(cases: list[Case], directory: Path, workers: dict[int, Workers]) -> dict[Case, list[dict[str, Any]]]:
    """Each leg's results, those of all its workers together."""
    results: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for leg in range(3):
        for count, processes in workers.items():
            now = {str(directory / str(case)): case for case in cases if CHAINS[case.chain][leg][0] == count}
            shares = processes.run(run_legs, now, leg) if now else []
            for case in now.values():
                joined = dict(shares[0][case])
                for part in joined.keys() & {"restored", "end"}:
                    joined[part] = {
                        kind: {name: tensor for share in shares for name, tensor in share[case][part][kind].items()}
                        for kind in KINDS
                    }
                results[case].append(joined)
    return results


def bits(tensors: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, bytes]]:
    return {kind: {name: bytes(tensor.numpy()) for name, tensor in named.items()} for kind, named in tensors.items()}


def check_chain(case: Case, legs: list[dict[str, Any]]) -> None:
    for leg in legs[1:]:
        assert all(leg["saved"][kind].keys() == leg["saved"]["weights"].keys() for kind in KINDS)
        assert bits(leg["restored"]) == bits(leg["saved"])
    tolerance = 1e-5 if case.precision == "fp32" else 2e-3
    losses = [loss for leg in legs[1:] for loss in leg["losses"]]
    assert losses == pytest.approx(legs[0]["unbroken"], rel=0, abs=tolerance)
    assert losses[-1] < legs[0]["losses"][0]
    if case.precision == "fp32":
        for kind in KINDS:
            torch.testing.assert_close(legs[2]["end"][kind], legs[0]["end"][kind], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def results(pair: Workers, single: Workers, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Any]:
    return run_chains(CASES, tmp_path_factory.mktemp("chains"), {2: pair, 1: single})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_after_each_switch_all_bits_are_those_of_the_checkpoint_and_the_losses_go_on(results, case: Case):
    check_chain(case, results[case])


@slow("4 minutes, of which 3 compile DeepSpeed's CPU AdamW; the same without offload stays")
@pytest.mark.timeout(900)  # for the compiler
def test_the_same_with_moments_and_weights_in_the_hosts_memory(
    offloading_pair: Workers, offloading_single: Workers, tmp_path: Path
):
    results = run_chains(OFFLOADED, tmp_path, {2: offloading_pair, 1: offloading_single})
    for case, legs in results.items():
        check_chain(case, legs)
