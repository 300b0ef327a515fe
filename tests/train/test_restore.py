"""Going on from a checkpoint: what is read, how often, what is in memory meanwhile, and what damage leads to."""

import errno
import logging
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from d2f_core.storage import UnreachableStorageError
from d2f_core.train import checkpoint, file_share, restore, zero
from d2f_core.train.checkpoint import KINDS, CheckpointError, TensorFile, read_tensors
from d2f_core.train.checkpoint_writer import CheckpointWriter
from d2f_core.train.config import EmaConfig, TrainConfig
from d2f_core.train.retention_rules import Retention
from d2f_core.train.task import Task
from d2f_core.train.weights import ParameterMismatchError
from d2f_core.train.worker_state import Worker
from tests.train.processes import Workers

WORKERS, LAYERS, WIDTH = 2, 6, 32
GOOD, VICTIM = "step-00000001.a", "step-00000002.a"


def task() -> Task:
    torch.manual_seed(0)
    return Task(
        module=nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))),
        to_batch=lambda rows: rows,
        loss_fn=lambda network, x: network(x).float().square().mean(dim=1),  # type: ignore[operator]
    )


def make_worker(rank: int, made: Task, stage: int, workers: int = WORKERS) -> Worker:
    config = TrainConfig(
        zero_stage=stage, precision="bf16", num_workers=workers, global_batch_size=2 * workers, micro_batch_size=2,  # type: ignore[arg-type]
        learning_rate=1e-2, ema=EmaConfig(decay=0.9),
    )  # fmt: skip
    return Worker(config, zero.build_engine(made.module, config, workers), rank, workers)


def rows() -> Any:
    return torch.ones(2, WIDTH, dtype=torch.bfloat16)


def save_two(rank: int, output: str) -> None:
    made = task()
    worker = make_worker(rank, made, 2)
    writer = CheckpointWriter(output, "a", rank, WORKERS, Retention())
    for step in (1, 2):
        zero.set_learning_rate(worker.engine, 1e-2)
        worker.engine.backward(made.loss_fn(worker.engine, rows()).mean())
        worker.engine.step()
        worker.update_averages(step)
        writer.save(step, samples=4 * step, identity="run", tensors=worker.share(), state={})
    writer.wait()
    writer.close()


@pytest.fixture(scope="module")
def saved(pair: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("saved")
    pair.run(save_two, str(output))
    return output


class FilesRead:
    """Files of checkpoints that this process reads, and bytes of the tensors out of them that are alive."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.alive = self.most = 0

    def add(self, size: int) -> None:
        self.alive += size
        self.most = max(self.most, self.alive)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what is hashed, and what is read."""
        check, read = file_share.check_file, TensorFile.read

        def check_file(place: str, file: Any, local: Path) -> None:
            self.names.append(file.path)
            check(place, file, local)

        def read_tensor(tensors: TensorFile, name: str) -> torch.Tensor:
            tensor = read(tensors, name)
            self.add(tensor.nbytes)
            weakref.finalize(tensor.untyped_storage(), self.add, -tensor.nbytes)
            return tensor

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(file_share, "check_file", check_file)
            patch.setattr(TensorFile, "read", read_tensor)
            yield


def go_on(rank: int, output: str, stage: int) -> dict[str, Any]:
    files, made = FilesRead(), task()
    with files.watch():
        found = restore.choose(output, "run", made.module, "cpu")
        assert found
        first = list(files.names)
        worker = make_worker(rank, made, stage)
        restore.put_back(worker, made, found, rows())
    return {"first": first, "all": files.names, "most": files.most, "owned": list(worker.owned())}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_tensor_or_two_are_in_memory_beside_the_model(pair: Workers, saved: Path, stage: int):
    for result in pair.run(go_on, str(saved), stage):
        assert 0 < result["most"] <= 2 * 4 * WIDTH**2


def test_every_file_is_hashed_by_one_worker_before_a_weight_is_used_and_again_when_it_is_put_back(pair, saved: Path):
    one, other = pair.run(go_on, str(saved), 2)
    for rank, result in enumerate((one, other)):
        assert sorted(result["first"]) == sorted(f"{kind}-{rank}.safetensors" for kind in KINDS)
        assert result["all"][len(result["first"]) :] == [f"{kind}-{rank}.safetensors" for kind in KINDS[1:]]
    last = checkpoint.list_checkpoints(str(saved))[-1]
    expected = {(kind, name): tensor for kind in KINDS for name, tensor in read_tensors(last, kind).items()}
    restored = {(kind, name): tensor for result in (one, other) for kind, name, tensor in result["owned"]}
    torch.testing.assert_close(restored, expected, rtol=0, atol=0)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def choose(rank: int, output: str) -> tuple[int, dict[str, torch.Tensor], str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    restore.logger.addHandler(handler)
    module = task().module
    found = restore.choose(output, "run", module, "cpu")
    restore.logger.removeHandler(handler)
    return found.manifest.step if found else 0, module.state_dict(), "\n".join(lines)


@pytest.mark.parametrize("file", [f"{kind}-{rank}.safetensors" for kind in KINDS for rank in range(WORKERS)])
def test_damage_that_any_worker_finds_is_named_by_all_and_all_go_back(pair, saved: Path, tmp_path: Path, file: str):
    shutil.copytree(saved, tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "checkpoints" / VICTIM / file)
    good = read_tensors(checkpoint.list_checkpoints(str(saved))[0], "weights")
    for step, weights, log in pair.run(choose, str(tmp_path / "run")):
        assert step == 1
        torch.testing.assert_close(weights, good, rtol=0, atol=0)
        assert f"{VICTIM} is damaged, the one before it is tried" in log and f"{file} has sha256" in log


def refusal(rank: int, output: str) -> str:
    with pytest.raises(CheckpointError) as refused:
        choose(rank, output)
    return str(refused.value)


def test_when_none_is_whole_nothing_is_trained(pair: Workers, saved: Path, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "checkpoints" / VICTIM / "ema-1.safetensors")
    flip_a_bit(tmp_path / "run" / "checkpoints" / GOOD / "weights-0.safetensors")
    assert all("none of 2 checkpoints is whole" in message for message in pair.run(refusal, str(tmp_path / "run")))


def damage_between(rank: int, output: str) -> str:
    made = task()
    found = restore.choose(output, "run", made.module, "cpu")
    assert found
    worker = make_worker(rank, made, 2)
    torch.distributed.barrier()
    if not rank:
        flip_a_bit(Path(found.uri, "exp_avg_sq-1.safetensors"))
    torch.distributed.barrier()
    with pytest.raises(CheckpointError) as refused:
        restore.put_back(worker, made, found, rows())
    return str(refused.value)


def test_damage_after_the_choice_is_an_error_that_names_the_file(pair: Workers, saved: Path, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "run")
    for message in pair.run(damage_between, str(tmp_path / "run")):
        assert "exp_avg_sq-1.safetensors has sha256" in message and "was damaged" in message


def fail_on_worker_1(rank: int, output: str, what: str, when: str) -> str:
    """The error of a restore during which one worker cannot read its files."""
    made, message = task(), "could not download s3://bucket/weights-1 in 9 attempts over 180 s"
    found = worker = None
    if when == "after the choice":
        found = restore.choose(output, "run", made.module, "cpu")
        worker = make_worker(rank, made, 2)

    def fail(*_: Any) -> None:
        raise UnreachableStorageError(message) if what == "check" else OSError(errno.EIO, message)

    place, name = (file_share, "check_file") if what == "check" else (file_share.FileShare, "_local")
    with pytest.MonkeyPatch.context() as patch, pytest.raises((UnreachableStorageError, OSError)) as refused:
        if rank == 1:
            patch.setattr(place, name, fail)
        if found and worker:
            restore.put_back(worker, made, found, rows())
        restore.choose(output, "run", made.module, "cpu")
    return f"{refused.type.__name__}: {refused.value}"


@pytest.mark.parametrize("when", ["at the choice", "after the choice"])
@pytest.mark.parametrize(("what", "kind"), [("check", "UnreachableStorageError"), ("disk", "OSError")])
def test_when_one_worker_cannot_read_all_fail_with_its_sentence(pair, saved: Path, what: str, kind: str, when: str):
    one, other = pair.run(fail_on_worker_1, str(saved), what, when)
    assert one == other and one.startswith(kind) and "could not download s3://bucket/weights-1 in 9 attempts" in one


def break_off_the_exchange(rank: int, output: str) -> str:
    """Worker 1 reads its first tensors, and then no more: the others are in the exchange already."""
    made, left, read = task(), [2 * LAYERS + 1], TensorFile.read

    def read_some(tensors: TensorFile, name: str) -> torch.Tensor:
        left[0] -= 1
        if rank and left[0] < 0:
            raise OSError(errno.EIO, "the disk is gone")
        return read(tensors, name)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="the disk is gone") as refused:
        patch.setattr(TensorFile, "read", read_some)
        restore.choose(output, "run", made.module, "cpu")
    return str(refused.value)


def test_a_disk_that_fails_during_an_exchange_fails_all(pair: Workers, saved: Path):
    assert pair.run(break_off_the_exchange, str(saved)) == ["[Errno 5] the disk is gone"] * WORKERS


def test_a_network_with_other_parameters_is_refused(saved: Path):
    with pytest.raises(ParameterMismatchError, match=r"do not have the same parameters: \['6\.bias', '6\.weight'\]"):
        restore.choose(str(saved), "run", nn.Sequential(*task().module, nn.Linear(1, 1)), "cpu")
