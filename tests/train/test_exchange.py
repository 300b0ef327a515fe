"""What passes between workers: the right elements, each once, and errors that all raise alike."""

import datetime
import time
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from d2f_core.storage import UnreachableStorageError
from d2f_core.train import exchange, group, partitions, zero
from d2f_core.train.config import EmaConfig, TrainConfig
from d2f_core.train.exchange import Spread, evenly
from d2f_core.train.worker_state import Worker
from tests.train.processes import Workers
from tests.train.test_partitioned import unlimited

WORKERS, WIDTH, LAYERS = 2, 32, 5
SIZES = (1, 7, 64, 0, 1000, 33)


def tensors() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=draw) for size in SIZES]


def spreads() -> list[Spread]:
    """Even stretches, and one that a single worker has."""
    found = [evenly(index % WORKERS, size, WORKERS) for index, size in enumerate(SIZES)]
    found[2] = Spread(0, np.array([0, 0]), np.array([0, SIZES[2]]))
    return found


def stretches(rank: int) -> list[Tensor]:
    return [
        whole[where.starts[rank] :][: where.counts[rank]] for whole, where in zip(tensors(), spreads(), strict=True)
    ]


def pass_on(rank: int) -> list[list[tuple[int, Tensor]]]:
    read = tensors().__getitem__
    owners = [where.owner for where in spreads()]
    return [
        list(exchange.gather(spreads(), stretches(rank), "cpu")),
        list(exchange.scatter(spreads(), read, "cpu")),
        list(exchange.to_all(owners, SIZES, read, "cpu")),
    ]


def test_gathering_scattering_and_giving_to_all_keep_every_bit(pair: Workers, single: Workers):
    for rank, (gathered, scattered, given) in enumerate(pair.run(pass_on)):
        owned = [(index, whole) for index, whole in enumerate(tensors()) if spreads()[index].owner == rank]
        torch.testing.assert_close(gathered, owned, rtol=0, atol=0)
        torch.testing.assert_close(
            sorted(scattered, key=lambda item: item[0]), list(enumerate(stretches(rank))), rtol=0, atol=0
        )
        torch.testing.assert_close(given, list(enumerate(tensors())), rtol=0, atol=0)


class Sent:
    """Bytes that this worker sends to others, by collective."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def add(self, name: str, size: int) -> None:
        self.bytes[name] = self.bytes.get(name, 0) + size

    def all_to_all(self, received: Tensor, mine: Tensor, expected: list[int], sent: list[int]) -> None:
        self.add("all_to_all_single", mine.element_size() * (sum(sent) - sent[dist.get_rank()]))
        SWAP(received, mine, expected, sent)


SWAP = dist.all_to_all_single
REFUSED = ("all_reduce", "all_gather_into_tensor", "all_gather", "broadcast", "reduce_scatter_tensor")


def join(rank: int, stage: int) -> dict[str, Any]:
    config = TrainConfig(
        zero_stage=stage, precision="bf16", num_workers=WORKERS, global_batch_size=4, micro_batch_size=2,  # type: ignore[arg-type]
        ema=EmaConfig(decay=0.0),
    )  # fmt: skip
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    with mock.patch.object(zero, "engine_config", unlimited):
        worker = Worker(config, zero.build_engine(module, config, WORKERS), rank, WORKERS)
    worker.engine.backward(worker.engine(torch.ones(2, WIDTH, dtype=torch.bfloat16)).float().square().mean())
    worker.engine.step()
    sent = Sent()
    others = {name: mock.Mock(side_effect=AssertionError(name)) for name in REFUSED}
    with mock.patch.multiple(dist, all_to_all_single=sent.all_to_all, **others):
        owned = {(kind, name): tensor.numel() for kind, name, tensor in worker.owned()}
    held = {
        (kind, name): partitions.spread(worker.engine, parameter, 0).counts
        for name, parameter in partitions.trained_parameters(worker.engine).items()
        for kind in ("weights", *partitions.MOMENTS)
    }
    return {"sent": sent.bytes["all_to_all_single"], "owned": owned, "held": held}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_saving_sends_each_element_to_the_worker_that_saves_it_and_to_no_other(pair: Workers, stage: int):
    """An all-reduce sends 12 bytes of every trained parameter from every worker, two of three kinds being moments."""
    results = pair.run(join, stage)
    held, total = results[0]["held"], 12 * LAYERS * (WIDTH**2 + WIDTH)
    for rank, result in enumerate(results):
        kept = sum(held[place][rank] for place in result["owned"])
        assert result["sent"] == 4 * (sum(counts[rank] for counts in held.values()) - kept)
    assert 0 < sum(result["sent"] for result in results) <= total
    saved = [place for result in results for place in result["owned"]]
    assert sorted(saved) == sorted(held), "each tensor is saved once"
    assert total == 4 * sum(size for result in results for size in result["owned"].values())


PARAMETERS = [320 * 320 * 9, 1280 * 1280, 1280, 640 * 2560] * 170
"""About as many, and of such sizes, as Stable Diffusion's UNet has."""


@pytest.mark.parametrize("workers", [512, 1024])
def test_a_worker_of_many_sends_and_receives_what_it_saves_and_not_the_model(workers: int):
    """Simulated: the spreads are made for so many workers, and no worker exists."""
    order = exchange.interleaved(len(PARAMETERS), workers)
    assert sorted(order) == list(range(len(PARAMETERS)))
    spreads = [evenly(index % workers, PARAMETERS[index], workers) for _ in range(3) for index in order]
    groups = list(exchange.in_batches(spreads, lambda where: where.load))
    received = sum(where.load for where in spreads)
    sent = sum(where.counts for where in spreads)
    assert 4 * sent.max() <= 1.01 * 12 * sum(PARAMETERS) / workers
    assert 4 * received.max() <= 12 * max(PARAMETERS) * 2 + 4 * sent.max()
    for some in groups:
        assert len(some) == 1 or sum(where.load for where in some).max() <= exchange.TOGETHER
    assert len(groups) <= 10, "latency counts: an exchange a tensor would be thousands"


def fail_on_one(rank: int, who: int) -> str:
    def work() -> int:
        if rank == who:
            raise UnreachableStorageError("could not download s3://bucket/weights-1 in 9 attempts over 180 s: reset")
        return rank

    try:
        return f"no error: {group.together(work, 'cpu', 'work')}"
    except UnreachableStorageError as error:
        return str(error)


@pytest.mark.parametrize("who", range(WORKERS))
def test_the_error_of_one_worker_is_that_of_all(pair: Workers, who: int):
    expected = "could not download s3://bucket/weights-1 in 9 attempts over 180 s: reset"
    assert pair.run(fail_on_one, who) == [expected] * WORKERS
    assert pair.run(fail_on_one, WORKERS) == [f"no error: {rank}" for rank in range(WORKERS)]


class TwoArgumentsError(Exception):
    """Pickled, it cannot be made again."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


def fail_oddly(rank: int) -> str:
    with pytest.raises(Exception) as refused:
        group.refuse_any(TwoArgumentsError("this", "that") if rank else None, "cpu")
    return f"{refused.type.__name__}: {refused.value}"


def test_an_error_that_cannot_be_passed_on_comes_as_its_text(pair: Workers):
    first, second = pair.run(fail_oddly)
    assert "TwoArgumentsError: this and that" in first and second == "TwoArgumentsError: this and that"


def wait_for_one(rank: int, seconds: float, longest: float) -> str:
    """Worker 1 works for so many seconds, in a group whose collectives end after one."""
    default = distributed_c10d._get_default_group()
    distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1), default)
    began = time.monotonic()
    try:
        with mock.patch.multiple(group, SIGN_SECONDS=0.1, LONGEST_WORK_SECONDS=longest):
            group.together(lambda: time.sleep(seconds * rank), "cpu", "read it")
        return f"{time.monotonic() - began:.1f}"
    except TimeoutError as error:
        return str(error)
    finally:
        distributed_c10d._set_pg_timeout(datetime.timedelta(minutes=30), default)


def test_work_may_take_longer_than_a_collective_and_not_for_ever(pair: Workers):
    assert all(2 <= float(seconds) < 10 for seconds in pair.run(wait_for_one, 2.0, 60.0))
    assert pair.run(wait_for_one, 3.0, 0.5) == ["could not read it in 0 s"] * WORKERS
