"""The bytes that a worker is said to need are those that a DeepSpeed engine allocates, on two processes."""

import gc
import time
from collections.abc import Callable, Iterable
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2f_core.model.footprint import PeakMemory, sizes
from d2f_core.train import exchange, memory, zero
from d2f_core.train.config import EmaConfig, TrainConfig
from d2f_core.train.memory import BYTES, memory_per_worker
from d2f_core.train.worker_state import Worker
from tests.train.processes import Workers

WORKERS, TOGETHER = 2, 320_000
ENGINES = [
    (0, "fp32", "fp32"), (2, "fp32", "fp32"), (3, "fp32", "fp32"),
    *((stage, "bf16", gradients) for stage in (1, 2, 3) for gradients in ("fp32", "same")),
]  # fmt: skip
"""Stage, precision of the passes, and of the gradients' sums."""


def config(stage: int, precision: str, gradients: str) -> TrainConfig:
    options: dict[str, Any] = {"zero_stage": stage, "precision": precision, "gradient_precision": gradients}
    return TrainConfig(
        **options, num_steps=3, global_batch_size=4, micro_batch_size=2, num_workers=WORKERS,
        ema=EmaConfig(decay=0.9),
    )  # fmt: skip


def network() -> nn.Module:
    """Six equal layers, of which two are frozen."""
    module = nn.Sequential(*(nn.Linear(400, 400, bias=False) for _ in range(6)))
    for layer in module[2:4]:
        layer.requires_grad_(False)
    return module


def allocated() -> int:
    """Bytes of all tensors of this process."""
    time.sleep(0.05)  # gloo's thread gives up the last tensor that it exchanged when it is given the interpreter's lock
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    tensors += [found.grad for found in tensors if found.is_leaf and found.grad is not None]
    tensors = [found for found in tensors if not found.is_meta]  # DeepSpeed keeps shapes as tensors without contents
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for size in storages.values())


def holders(tensors: Iterable[Tensor]) -> list[int]:
    """How many references to each there are, gloo's among them."""
    return [cast(Any, tensor)._use_count() for tensor in tensors]


def letting_go(collective: Callable[..., None]) -> Callable[..., None]:
    """The collective, returning when gloo's thread has let go of its tensors, which a busy machine may let it do late.

    Held that long they would count as the worker's own.
    """

    def call(*arguments: Any) -> None:
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        counts = holders(tensors)
        collective(*arguments)
        deadline = time.monotonic() + 20
        while holders(tensors) != counts:
            assert time.monotonic() < deadline, "gloo's thread holds the tensors of a collective that is over"
            time.sleep(0.001)

    return call


EXCHANGES = {name: letting_go(getattr(dist, name)) for name in ("all_to_all_single", "all_reduce")}


def measure(stage: int, precision: str, gradients: str, rank: int) -> dict[str, int]:
    before = allocated()
    settings = config(stage, precision, gradients)
    engine = zero.build_engine(network(), settings, WORKERS)
    worker = Worker(settings, engine, rank, WORKERS)
    x = torch.randn(2, 400, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    peaks = {"passing": 0, "stepping": 0, "saving": 0}
    for _ in range(3):
        with PeakMemory() as passing:
            engine.backward(engine(x).float().square().mean())
        with PeakMemory() as stepping:
            engine.step()
        worker.update_averages(1)
        with cast(Any, mock.patch.multiple)(dist, **EXCHANGES), PeakMemory() as saving:
            worker.share()
        for name, part in (("passing", passing), ("stepping", stepping), ("saving", saving)):
            peaks[name] = part.peak
    state = allocated() - before
    worker.averages.clear()
    return {"state": state, **peaks}


def measure_all(rank: int) -> dict[str, Any]:
    exchange.TOGETHER = TOGETHER
    measure(*ENGINES[0], rank)  # imports the rest of DeepSpeed
    gc.freeze()  # its objects would be looked through at each measurement
    return {str(engine): measure(*engine, rank) for engine in ENGINES}


@pytest.fixture(scope="module")
def measured(pair: Workers) -> dict[str, Any]:
    return pair.run(measure_all)[0]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_an_engine_allocates_what_was_predicted(
    measured: dict[str, Any], engine: tuple[int, str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "TOGETHER", TOGETHER)
    found, (stage, precision, _) = measured[str(engine)], engine
    trained, frozen = (sizes(network(), trained=which) for which in (True, False))
    needed = memory_per_worker(config(*engine), trained, frozen)
    whole = BYTES[precision] * sum(trained + frozen)
    # Between two steps stage 3 holds shares alone, with the gradients' and the bucket, which other stages give up.
    between = needed.state
    if stage == 3:
        between += needed.gradients + needed.bucket - whole
    assert found["state"] == pytest.approx(between, rel=0.01, abs=20_000)
    bucket = needed.bucket if stage in (1, 2) else 0
    slack = 400 * 400 * BYTES[precision]  # the layer at work, and activations
    predicted = needed.gradients + needed.copies + (whole if stage == 3 else 0)
    assert 0.45 * predicted < found["passing"] - bucket <= predicted + slack
    assert found["stepping"] <= needed.stepping + needed.gradients + slack
    if stage:
        # The averages are gathered to the host, which is where these engines' devices have their memory too.
        averages = 0 if stage < 3 and precision == "fp32" else 4 * sum(trained) // WORKERS
        assert 0 <= needed.saving + averages - found["saving"] <= 4 * TOGETHER


def test_adapters_pay_for_their_own_state_only():
    full, adapted = (
        memory_per_worker(config(2, "bf16", "fp32"), trained, frozen)
        for trained, frozen in (([10**6] * 100, []), ([10**6], [10**6] * 100))
    )
    assert full.moments == 100 * adapted.moments == 8 * 10**8 // WORKERS
    assert adapted.weights == 2 * 101 * 10**6 and adapted.bucket == 2 * 10**6 and full.bucket == 2 * 10**8


def test_offloading_moves_bytes_to_the_host():
    trained = [10**6] * 1000
    kept = memory_per_worker(TrainConfig(zero_stage=3, precision="bf16"), trained, [])
    options = {"zero_stage": 3, "precision": "bf16", "optimizer": "cpu_adamw"}
    moments = memory_per_worker(TrainConfig(offload="optimizer", **options), trained, [])
    weights = memory_per_worker(TrainConfig(offload="optimizer_and_weights", **options), trained, [])
    assert (moments.master, moments.moments, moments.gradients) == (0, 0, 0)
    assert kept.peak - moments.peak >= 12 * 10**9 and moments.host - kept.host == (12 + 4 + 4 + 4) * 10**9
    assert moments.weights - weights.weights == weights.host - moments.host == 2 * 10**9


def test_the_peak_is_the_largest_of_passing_stepping_and_saving():
    alone = TrainConfig(zero_stage=2, precision="bf16", global_batch_size=64)
    saving = memory_per_worker(alone, [10**6] * 2000, [])
    assert saving.peak == saving.state + saving.saving == 2 * 10**9 * (2 + 4 + 8 + 4 + 12) + 4 * memory.TOGETHER
    passing = memory_per_worker(alone, [10**6] * 2000, [], activations=60 * 10**9)
    assert passing.peak == passing.state + 10**9 + 60 * 10**9 + passing.gradients
