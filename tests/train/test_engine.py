"""Every way to run the engine, on two processes, against one plain torch process; and what a resumed run equals."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from d2f_core.train import partitions, zero
from d2f_core.train.config import TrainConfig
from d2f_core.train.worker_state import Worker
from tests.slow import slow
from tests.train.processes import Workers

WORKERS = 2
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 2e-4}  # seen: 8e-9, 3e-4, 4e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    stage: int
    precision: str = "fp32"
    accumulation: int = 1
    offload: str = "none"
    recompute: bool = False
    loss_factor: float = 1.0
    """Makes fp16 gradients overflow until the loss scale has come down."""

    @property
    def steps(self) -> tuple[int, int]:
        """Steps before the checkpoint and after it; more where a difference would show late."""
        return (40, 10) if self.offload != "none" else (5, 12 if self.loss_factor > 1 else 2)

    @property
    def config(self) -> TrainConfig:
        fields: dict[str, Any] = {"zero_stage": self.stage, "precision": self.precision, "offload": self.offload}
        return TrainConfig(
            **fields, global_batch_size=8 * self.accumulation, micro_batch_size=4, num_workers=WORKERS,
            learning_rate=1e-2, weight_decay=0.1, activation_checkpointing=self.recompute,
            optimizer="adamw" if self.offload == "none" else "cpu_adamw",
            use_gpu=self.precision == "fp16",  # fp16 is for GPUs; the processes here compute it on the CPU
        )  # fmt: skip


PLAIN = [
    *(Case(stage, accumulation=parts) for stage in range(4) for parts in (1, 2)),
    *(Case(stage, "bf16", parts) for stage in (1, 2, 3) for parts in (1, 2)),
    *(Case(stage, "fp16") for stage in (1, 2, 3)),
    *(Case(stage, recompute=True) for stage in range(4)),
]
OVERFLOWING = [Case(stage, "fp16", loss_factor=factor) for stage, factor in ((1, 8.0), (2, 8.0), (3, 8.0), (3, 1e3))]
BROKEN = [Case(0), *(Case(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16"))]
OFFLOADED = [
    Case(1, accumulation=2, offload="optimizer"),
    Case(2, accumulation=2, offload="optimizer"),
    Case(3, accumulation=2, offload="optimizer_and_weights"),
    Case(3, "bf16", accumulation=2, offload="optimizer"),
]
INTO_OFFLOAD = Case(1, accumulation=2)


class Network(nn.Module):
    """Odd sizes, which two workers cannot halve, and a frozen parameter, as in a LoRA training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.calls, self.recompute = nn.Linear(5, 7), nn.Linear(7, 3), 0, False
        self.first.bias.requires_grad_(False)

    def enable_gradient_checkpointing(self) -> None:
        self.recompute = True

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.tanh(self.first(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = checkpoint(self.hidden, x, use_reentrant=False) if self.recompute else self.hidden(x)
        return self.second(hidden)


def batch(step: int) -> torch.Tensor:
    return torch.randn(16, 5, generator=torch.Generator().manual_seed(step))


def build(case: Case, module: Network) -> Any:
    if case.recompute:
        zero.enable_activation_checkpointing(module)
    return zero.build_engine(module, case.config, WORKERS)


def run(engine: Any, case: Case, steps: Iterable[int], rank: int) -> list[float]:
    """The mean loss of each step over all workers."""
    losses = []
    for step in steps:
        zero.set_learning_rate(engine, 1e-2)
        total = torch.zeros(())
        for part in range(case.accumulation):
            x = batch(step)[8 * part + 4 * rank :][:4].to(DTYPES[case.precision])
            loss = case.loss_factor * engine(x).float().square().mean()
            engine.backward(loss)
            engine.step()
            total += loss.detach() / case.accumulation / WORKERS
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


def read(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and moments of every parameter, as a checkpoint holds them, on every worker."""
    worker = Worker(TrainConfig(), engine, rank=dist.get_rank(), num_workers=WORKERS)
    shares: list[list[tuple[str, str, torch.Tensor]]] = [[] for _ in range(WORKERS)]
    dist.all_gather_object(shares, [(kind, name, tensor.clone()) for kind, name, tensor in worker.owned()])
    found: dict[str, dict[str, torch.Tensor]] = {}
    for kind, name, tensor in (one for share in shares for one in share):
        found.setdefault(name, {})[kind] = tensor
    return found


def resume(case: Case, saved: dict[str, dict[str, torch.Tensor]], steps: int, state: str) -> Any:
    module = Network()
    module.load_state_dict({name: tensors["weights"] for name, tensors in saved.items()}, strict=False)
    engine = build(case, module)
    x = batch(0)[:4].to(DTYPES[case.precision])
    fresh = zero.engine_state(engine)
    parameters = partitions.trained_parameters(engine)
    moments = [
        (moment, name, partitions.partition_of(engine, parameters[name], tensors[moment]))
        for name, tensors in saved.items()
        for moment in partitions.MOMENTS
    ]
    zero.restore_moments(engine, moments, steps, lambda: engine(x).float().square().mean())
    assert {**zero.engine_state(engine), "optimizer_steps": 0} == {**fresh, "optimizer_steps": 0}
    zero.restore_engine_state(engine, json.loads(state))
    return engine


def train_save_and_resume(case: Case, other: Case, rank: int) -> dict[str, Any]:
    module = Network()
    engine = build(case, module)
    result: dict[str, Any] = {"start": read(engine), "losses": run(engine, case, range(case.steps[0]), rank)}
    result["calls"] = module.calls
    if case.accumulation == 1 and case.loss_factor == 1:  # the losses are compared; a run that goes on costs three more
        return result
    saved, state = read(engine), json.dumps(zero.engine_state(engine))
    result |= {"state": json.loads(state), "saved": saved}
    steps = range(case.steps[0], sum(case.steps))
    result["unbroken"] = [run(engine, case, steps, rank), read(engine), zero.engine_state(engine)]
    for name, target in {"same": case, "other": other}.items():
        resumed = resume(target, saved, case.steps[0], state)
        result[f"{name} restored"] = read(resumed)
        result[name] = [run(resumed, target, steps, rank), read(resumed), zero.engine_state(resumed)]
    return result


def break_a_gradient(case: Case, rank: int) -> dict[str, Any]:
    """The loss stays finite; the gradient is NaN on one of the workers."""
    engine = build(case, Network())
    run(engine, case, range(1), rank)
    before, message = read(engine), ""
    output = engine(batch(1)[:4].to(DTYPES[case.precision])).float()
    engine.backward((output * 0).abs().sqrt().sum() if rank else output.sum())
    try:
        engine.step()
    except zero.NonFiniteGradientError as error:
        message = str(error)
    messages: list[str | None] = [None] * WORKERS
    dist.all_gather_object(messages, message)
    return {"before": before, "after": read(engine), "messages": messages}


def other_way(case: Case) -> Case:
    """Another stage to resume at; from offloaded moments to resident ones."""
    stage = (case.stage + 1) % 4 or (0 if case.precision == "fp32" else 1)
    return Case(stage, case.precision, case.accumulation, loss_factor=case.loss_factor)


def run_cases(rank: int, offloaded: bool) -> dict[str, dict[str, Any]]:
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed refuses CPUs without fp16 arithmetic; torch computes it on any.
    cast(Any, get_accelerator()).is_fp16_supported = lambda: True
    results: dict[Case, dict[str, Any]] = {}
    for case in OFFLOADED if offloaded else PLAIN + OVERFLOWING:
        results[case] = train_save_and_resume(case, other_way(case), rank)
    if not offloaded:
        results |= {Case(case.stage, case.precision, -1): break_a_gradient(case, rank) for case in BROKEN}
    else:
        results[INTO_OFFLOAD] = train_save_and_resume(INTO_OFFLOAD, OFFLOADED[1], rank)
    return {str(case): result for case, result in results.items()}


@pytest.fixture(scope="module")
def results(pair: Workers) -> dict[str, Any]:
    return pair.run(run_cases, False)[0]


def plain_losses(accumulation: int, steps: int) -> list[float]:
    module, losses = Network(), []
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(steps):
        loss = module(batch(step)[: 8 * accumulation]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_exact(case: Case, result: dict[str, Any]) -> None:
    assert result["losses"] == pytest.approx(
        plain_losses(case.accumulation, case.steps[0]), rel=0, abs=TOLERANCE[case.precision]
    )
    assert result["losses"][-1] < result["losses"][0]
    if "saved" not in result:
        return
    # What was saved is there to the last bit after the step of zero loss, at any stage, and the run goes on from it.
    for name in ("same restored", "other restored"):
        torch.testing.assert_close(result[name], result["saved"], rtol=0, atol=0)
    assert result["same"][0] == result["unbroken"][0] and result["same"][2] == result["unbroken"][2] == {}
    torch.testing.assert_close(result["same"][1], result["unbroken"][1], rtol=0, atol=0)
    tolerance = 1e-6 if case.precision == "fp32" else 2e-3
    assert result["other"][0] == pytest.approx(result["unbroken"][0], rel=0, abs=tolerance)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_losses_equal_one_plain_process_and_a_resumed_run_goes_on_exactly(results: dict[str, Any], case: Case) -> None:
    check_exact(case, results[str(case)])
    assert ("saved" in results[str(case)]) is (case.accumulation == 2)
    assert results[str(case)]["calls"] == case.steps[0] * case.accumulation * (2 if case.recompute else 1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_keep_the_digits_that_the_forward_dtype_drops(results: dict[str, Any], stage: int, precision: str):
    start = results[str(Case(stage, precision))]["start"]
    for name, parameter in Network().named_parameters():
        if parameter.requires_grad:
            assert torch.equal(start[name]["weights"], parameter.detach())
            assert not torch.equal(parameter.detach().to(DTYPES[precision]).float(), parameter.detach())


@pytest.mark.parametrize("case", OVERFLOWING, ids=str)
def test_fp16_leaves_out_steps_that_overflow_and_a_resumed_run_does_the_same(results: dict[str, Any], case: Case):
    result = results[str(case)]
    skipped, scale = result["state"]["skipped_steps"], result["state"]["loss_scaler"]["cur_scale"]
    assert skipped >= 2 and scale < 2**16 and result["state"]["optimizer_steps"] == case.steps[0] - skipped
    if case.loss_factor == 1e3:  # saved before any step could be made
        assert not result["state"]["optimizer_steps"]
        torch.testing.assert_close(result["saved"], result["start"], rtol=0, atol=0)
    last = result["unbroken"][2]
    assert last["optimizer_steps"] > result["state"]["optimizer_steps"]
    assert result["same"][0] == result["unbroken"][0] and result["same"][2] == last and result["other"][2] == last
    torch.testing.assert_close(result["same"][1], result["unbroken"][1], rtol=0, atol=0)


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_a_gradient_that_is_not_finite_stops_every_worker_and_spares_the_weights(results: dict[str, Any], case: Case):
    result = results[str(Case(case.stage, case.precision, -1))]
    assert all("a gradient is not" in message for message in result["messages"])
    torch.testing.assert_close(result["after"], result["before"], rtol=0, atol=0)


def test_nothing_is_compiled_for_adamw(results: dict[str, Any], extensions: Path) -> None:
    assert results and not list(extensions.iterdir())


@slow("4 minutes, of which 3 compile DeepSpeed's CPU AdamW; the same without offload stays")
@pytest.mark.timeout(900)  # for the compiler
def test_offloaded_moments_and_weights_train_and_resume_exactly(offloading_pair: Workers) -> None:
    results = offloading_pair.run(run_cases, True)[0]
    for case in (*OFFLOADED, INTO_OFFLOAD):
        check_exact(case, results[str(case)])
