"""Saving goes on behind the training, tells of its errors, and never leaves a half checkpoint that can be loaded."""

import errno
import itertools
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2f_core import storage
from d2f_core.train.checkpoint import list_checkpoints, read_tensors
from d2f_core.train.checkpoint_writer import CheckpointWriter
from d2f_core.train.retention import write_evaluation
from d2f_core.train.retention_rules import Retention
from d2f_core.train.sealed import CheckpointError, UnfinishedSaveError
from tests.train.test_checkpoint import KEEP_ALL, equal, shares


def save(
    writer: CheckpointWriter, step: int, tensors: dict[str, dict[str, Tensor]] | None = None, **state: Any
) -> None:
    own = tensors or shares(step, writer.num_workers)[writer.rank]
    writer.save(step, samples=step * 4, identity="run", tensors=own, state=state)


def steps(output: Path) -> list[int]:
    return [found.manifest.step for found in list_checkpoints(str(output))]


class Gate:
    """Writes nothing before it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()

    def write(self, uri: str, data: bytes, *, exclusive: bool = False) -> None:
        self.reached.set()
        assert self.opened.wait(30)
        storage.write_bytes(uri, data, exclusive=exclusive)


class FailsAt:
    """Fails at one write, counted over all workers."""

    def __init__(self, number: int) -> None:
        self.number, self.count = number, itertools.count()

    def write(self, uri: str, data: bytes, *, exclusive: bool = False) -> None:
        if next(self.count) == self.number:
            raise ConnectionError("the network is gone")
        storage.write_bytes(uri, data, exclusive=exclusive)


def test_workers_that_wait_end_only_when_the_checkpoint_is_complete(tmp_path):
    writers = [CheckpointWriter(str(tmp_path), "a", rank, 3, KEEP_ALL, share_seconds=30) for rank in range(3)]
    seen: list[list[int]] = []

    def worker(writer: CheckpointWriter) -> None:
        for step in (1, 2):
            save(writer, step)
        writer.wait()
        seen.append(steps(tmp_path))
        writer.close()

    threads = [threading.Thread(target=worker, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [[1, 2]] * 3
    assert writers[0].last_complete == (2, f"{tmp_path}/checkpoints/step-00000002.a")
    assert writers[1].last_complete is None


def test_a_save_returns_before_anything_is_uploaded(tmp_path):
    gate = Gate()
    writer = CheckpointWriter(str(tmp_path), "a", 0, 1, KEEP_ALL, write=gate.write)
    save(writer, 1)
    assert gate.reached.wait(30)
    writer.poll()
    assert list(tmp_path.iterdir()) == [] and writer.last_complete is None
    gate.opened.set()
    writer.wait()
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), UnfinishedSaveError),
        (OSError(errno.EMFILE, "Too many open files"), UnfinishedSaveError),
        (storage.UnreachableStorageError("could not write: ExpiredToken"), UnfinishedSaveError),
        (storage.StorageError("the disk is full"), CheckpointError),
        (RuntimeError("a bug"), CheckpointError),
    ],
)
def test_a_save_that_a_restart_may_mend_is_no_verdict(tmp_path, error, kind):
    def write(*_: Any, **__: Any) -> None:
        raise error

    writer = CheckpointWriter(str(tmp_path), "a", 0, 1, KEEP_ALL, write=write)
    save(writer, 1)
    with pytest.raises(CheckpointError) as caught:
        writer.wait()
    assert type(caught.value) is kind


def test_changes_after_save_do_not_change_what_is_written(tmp_path):
    gate = Gate()
    writer = CheckpointWriter(str(tmp_path), "a", 0, 1, KEEP_ALL, write=gate.write)
    grid = torch.arange(6.0).reshape(2, 3)
    tensors = {"weights": {"plain": grid, "view": grid.T}, "ema": {"parameter": torch.nn.Parameter(torch.ones(2))}}
    expected = {"plain": grid.clone(), "view": grid.T.clone()}
    ledger = ["one"]
    writer.save(1, samples=4, identity="run", tensors=tensors, state={"ledger": ledger})
    grid.zero_()
    tensors["weights"].clear()
    ledger.append("two")
    gate.opened.set()
    writer.wait()
    [found] = list_checkpoints(str(tmp_path))
    assert equal(read_tensors(found, "weights"), expected)
    assert equal(read_tensors(found, "ema"), {"parameter": torch.ones(2)})
    assert found.manifest.state == {"ledger": ["one"]}


def test_a_second_save_copies_only_when_the_first_is_complete(tmp_path):
    gate = Gate()
    writer = CheckpointWriter(str(tmp_path), "a", 0, 1, KEEP_ALL, write=gate.write)
    complete_when_copied = []

    class Watched(dict):
        def items(self):
            complete_when_copied.append(steps(tmp_path))
            return super().items()

    save(writer, 1)
    second = threading.Thread(target=save, args=(writer, 2, {"weights": Watched(w=torch.ones(1))}))
    second.start()
    assert gate.reached.wait(30)
    gate.opened.set()
    second.join(30)
    writer.wait()
    assert complete_when_copied == [[1]]


def test_state_that_is_not_json_is_refused_at_once(tmp_path):
    writer = CheckpointWriter(str(tmp_path), "a", 0, 1, KEEP_ALL)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(writer, 1, rows={1, 2})


def test_a_worker_that_never_comes_is_named_and_nothing_can_be_loaded(tmp_path):
    writers = [CheckpointWriter(str(tmp_path), "a", rank, 4, KEEP_ALL, share_seconds=0.5) for rank in range(2)]
    for writer in writers:
        save(writer, 1)
    with pytest.raises(
        UnfinishedSaveError, match=r"step 1 failed on worker 0\..* no share of worker 2, 3 after 0\.5 s"
    ):
        writers[0].wait()
    with pytest.raises(UnfinishedSaveError, match=r"no manifest of worker 0 after 0\.5 s"):
        writers[1].wait()
    assert steps(tmp_path) == []
    assert not list(tmp_path.rglob("manifest.json"))


def test_the_error_of_an_upload_comes_out_of_every_later_call(tmp_path):
    (tmp_path / "file").write_text("in the way")
    writer = CheckpointWriter(str(tmp_path / "file" / "run"), "a", 0, 1, KEEP_ALL)
    save(writer, 1)
    for call in (writer.wait, writer.poll, writer.wait, lambda: save(writer, 2)):
        with pytest.raises(CheckpointError, match="Saving step 1 failed on worker 0"):
            call()


def test_a_full_disk_is_named_and_the_checkpoint_before_stays(tmp_path):
    """The limit of a file's size stands for the disk's."""
    writer = CheckpointWriter(str(tmp_path), "a", 0, 1, KEEP_ALL)
    save(writer, 1)
    writer.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        save(writer, 2, {"weights": {"large": torch.ones(50_000)}})
        with pytest.raises(
            CheckpointError, match=r"Saving step 2 failed on worker 0\. .*weights-0.* do not fit"
        ) as caught:
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not isinstance(caught.value, UnfinishedSaveError), "a restart would end alike"
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("number", range(11))
def test_a_save_that_fails_anywhere_leaves_nothing_to_load(tmp_path, number):
    """Two workers write 4 files and a share each, and worker 0 the manifest."""
    write = FailsAt(number).write
    writers = [CheckpointWriter(str(tmp_path), "a", r, 2, KEEP_ALL, share_seconds=0.3, write=write) for r in range(2)]
    for writer in writers:
        save(writer, 1)
    with pytest.raises(CheckpointError):
        writers[0].wait()
    with pytest.raises(CheckpointError):
        writers[1].wait()
    assert steps(tmp_path) == []


def test_an_attempt_that_was_there_before_fails(tmp_path):
    for again in (False, True):
        writer = CheckpointWriter(str(tmp_path), "a", 0, 1, KEEP_ALL)
        save(writer, 1, {"weights": {"w": torch.full((2,), float(again))}})
        if again:
            with pytest.raises(CheckpointError, match=r"has manifest\.json already.*attempt of its own"):
                writer.wait()
        else:
            writer.wait()
    assert read_tensors(list_checkpoints(str(tmp_path))[0], "weights")["w"].tolist() == [0, 0]


def test_a_share_of_an_earlier_start_is_never_joined_to_new_ones(tmp_path):
    """Worker 0 of the first start died just before the manifest; the second start has the same attempt."""
    first = [CheckpointWriter(str(tmp_path), "a", r, 2, KEEP_ALL, write=FailsAt(5).write) for r in range(2)]
    for writer in first:
        save(writer, 1)
    with pytest.raises(CheckpointError, match="the network is gone"):
        first[0].wait()
    first[1]._join()
    assert (tmp_path / "checkpoints" / "step-00000001.a" / "share-1.json").exists()
    second = CheckpointWriter(str(tmp_path), "a", 0, 2, KEEP_ALL)
    save(second, 1, {"weights": {"w": torch.ones(1)}})
    with pytest.raises(CheckpointError, match=r"has share-0\.json already"):
        second.wait()
    assert steps(tmp_path) == []


def test_a_start_whose_first_worker_died_leaves_no_share_to_the_next_start(tmp_path):
    old = CheckpointWriter(str(tmp_path), "a", 1, 2, KEEP_ALL, share_seconds=0.3)
    save(old, 1, {"weights": {"old": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match=r"no share of worker 0 after 0\.3 s"):
        old.wait()
    new = [CheckpointWriter(str(tmp_path), "a", rank, 2, KEEP_ALL, share_seconds=30) for rank in range(2)]
    for writer in new:
        save(writer, 1)
    new[0].wait()
    [found] = list_checkpoints(str(tmp_path))
    assert equal(read_tensors(found, "weights"), shares(1)[0]["weights"] | shares(1)[1]["weights"])


def test_a_request_that_is_repeated_after_a_lost_answer_is_no_error(tmp_path):
    def twice(uri: str, data: bytes, *, exclusive: bool = False) -> None:
        storage.write_bytes(uri, data, exclusive=exclusive)
        storage.write_bytes(uri, data, exclusive=exclusive)

    writer = CheckpointWriter(str(tmp_path), "a", 0, 1, KEEP_ALL, write=twice)
    save(writer, 1)
    writer.wait()
    assert steps(tmp_path) == [1]


def test_a_manifest_of_another_process_is_an_error(tmp_path):
    def after_another(uri: str, data: bytes, *, exclusive: bool = False) -> None:
        if uri.endswith("manifest.json"):
            storage.write_bytes(uri, b"{}")
        storage.write_bytes(uri, data, exclusive=exclusive)

    writer = CheckpointWriter(str(tmp_path), "a", 0, 1, KEEP_ALL, write=after_another)
    save(writer, 1)
    with pytest.raises(CheckpointError, match="written by another process of the same attempt"):
        writer.wait()


def test_a_parameter_that_two_workers_save_is_refused(tmp_path):
    writers = [CheckpointWriter(str(tmp_path), "a", rank, 2, KEEP_ALL) for rank in range(2)]
    for writer in writers:
        save(writer, 1, {"weights": {"w": torch.ones(1)}})
    with pytest.raises(CheckpointError, match="weights of 'w' was saved by two workers"):
        writers[0].wait()
    assert steps(tmp_path) == []


def test_closing_gives_up_a_save_that_waits_for_others(tmp_path):
    writer = CheckpointWriter(str(tmp_path), "a", 0, 2, KEEP_ALL)
    save(writer, 1)
    writer.close()
    assert not any(thread.name == "checkpoint-1" for thread in threading.enumerate())
    with pytest.raises(CheckpointError, match="closed before the checkpoint was complete"):
        writer.poll()
    assert steps(tmp_path) == []


def test_a_closed_writer_saves_no_more(tmp_path):
    writer = CheckpointWriter(str(tmp_path), "a", 0, 1, KEEP_ALL)
    writer.close()
    with pytest.raises(CheckpointError, match="is closed"):
        save(writer, 1)


def test_the_last_the_best_every_so_many_the_protected_and_the_last_good_stay(tmp_path):
    rule = Retention(keep_last=1, keep_best=1, metric="loss", keep_every=5)
    writer = CheckpointWriter(str(tmp_path), "a", 0, 1, rule)
    for step in range(1, 10):
        save(writer, step)
        writer.wait()
        assert writer.last_complete
        write_evaluation(writer.last_complete[1], {"loss": abs(step - 3)})
        if step == 2:
            writer.protected.add(writer.last_complete[1])
    assert steps(tmp_path) == [2, 3, 5, 8, 9], "8 is the newest evaluated one when 9 is complete"
    writer.protected.clear()
    save(writer, 10)
    writer.wait()
    assert steps(tmp_path) == [3, 5, 9, 10]


def test_a_run_behind_a_damaged_checkpoint_keeps_its_new_ones(tmp_path):
    for attempt, some in (("a", (1, 9)), ("b", (2, 3))):
        writer = CheckpointWriter(str(tmp_path), attempt, 0, 1, Retention(keep_last=2))
        for step in some:
            save(writer, step)
        writer.wait()
    assert steps(tmp_path) == [2, 3, 9]


@pytest.mark.parametrize(("rank", "attempt", "message"), [(2, "a", "rank=2 must"), (0, "../a", "not a plain name")])
def test_an_impossible_writer_is_refused(tmp_path, rank, attempt, message):
    with pytest.raises(CheckpointError, match=message):
        CheckpointWriter(str(tmp_path), attempt, rank, 2, KEEP_ALL)


def longest_stop(directory: Path, tensors: dict[str, dict[str, Tensor]]) -> float:
    """Seconds that this thread, which wakes every millisecond, stood at most while the tensors were saved."""
    writer = CheckpointWriter(str(directory), "a", 0, 1, KEEP_ALL)
    save(writer, 1, tensors)
    longest, last = 0.0, time.perf_counter()
    while not writer.last_complete:
        writer.poll()
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    writer.wait()
    shutil.rmtree(directory)
    return longest


def test_saving_a_quarter_of_a_gigabyte_stops_the_training_thread_for_less_than_50_ms(tmp_path):
    """`safetensors.save` stops it for 130 ms and more; a busy machine may do so by itself, but not each time."""
    tensors = {"weights": {str(number): torch.ones(1024, 1024) for number in range(64)}}
    assert any(longest_stop(tmp_path / str(number), tensors) < 0.05 for number in range(5))
