"""How often the workers of a training ask S3 when a checkpoint is saved and restored: it is divided, not repeated.

On 1, 2 and 4 workers it is counted in their own clients of the S3 server. 1,024 workers are simulated: their writers
are threads of one process, their shares of a restore are verified one after the other, and S3 is a dictionary.
"""

import fcntl
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from d2f_core import s3 as s3_client
from d2f_core.train import checkpoint, file_share, restore
from d2f_core.train.checkpoint import KINDS
from d2f_core.train.checkpoint_writer import CheckpointWriter
from d2f_core.train.config import Retention
from d2f_core.train.file_share import FileShare
from infra.local.stack import StackEnv
from tests.train.processes import Workers
from tests.train.test_restore import make_worker, rows, task

MANY = 1024


class FakeS3:
    """Objects in memory, behind the calls of s3fs that are used here; counts requests as S3 does."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self._lock = threading.Lock()

    def _count(self, what: str, requests: int = 1) -> None:
        with self._lock:
            self.requests[what] += requests

    def call_s3(self, operation: str, *, Bucket: str, Key: str) -> None:  # boto's names
        assert operation == "head_object"
        self._count("HEAD")
        if f"{Bucket}/{Key}" not in self.objects:
            raise FileNotFoundError(Key)

    def cat_file(self, path: str, *, max_concurrency: int = 10, **_: Any) -> bytes:
        if max_concurrency > 1:
            self._count("HEAD")
        self._count("GET")
        if path not in self.objects:
            raise FileNotFoundError(path)
        self.read[path] += 1
        return self.objects[path]

    def get_file(self, path: str, target: str) -> None:
        Path(target).write_bytes(self.cat_file(path, max_concurrency=1))

    def pipe_file(self, path: str, data: bytes, *, mode: str = "overwrite", **_: Any) -> None:
        self._count("PUT")
        with self._lock:
            assert mode != "create" or path not in self.objects
            self.objects[path] = data

    def ls(self, path: str, *, detail: bool) -> list[str]:
        below = {
            name.removeprefix(f"{path}/").partition("/")[0] for name in list(self.objects) if name.startswith(path)
        }
        self._count("LIST", -(-len(below) // 1000) or 1)
        return [f"{path}/{name}" for name in sorted(below)]

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """The requests made within the context."""
        before, found = self.requests.copy(), Counter[str]()
        yield found
        found.update(self.requests - before)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeS3:
    made = FakeS3()
    monkeypatch.setattr(s3_client, "open_s3", lambda *, attempts: made)
    return made


def simulated_save(output: str, workers: int) -> None:
    """All workers' writers, each with a tensor of each kind."""
    writers = [CheckpointWriter(output, "a", rank, workers, Retention(), share_seconds=60) for rank in range(workers)]
    for writer in writers:
        tensors = {kind: {f"layer.{writer.rank}": torch.full((2,), float(writer.rank))} for kind in KINDS}
        writer.save(1, samples=4, identity="run", tensors=tensors, state={})
    for writer in writers:
        writer._join()  # `wait` also waits for the manifest, which only the end of a training does


def simulated_restore(output: str, workers: int) -> None:
    """What the first worker finds, and what every worker reads of it, before and after the engine is built."""
    (found,) = checkpoint.candidates(output, "run")
    shapes = {name: (2,) for name in found.manifest.tensors["weights"]}
    for rank in range(workers):
        share = FileShare(found, rank, workers)
        share.verify(shapes)
        for kind in KINDS:
            share.check(kind)
            for place in share.holds:
                if place[0] == kind:
                    share.read(*place)
            share.drop(kind)
        assert not share.failure
        share.close()


def each_once(fake: FakeS3) -> bool:
    return all(count == 1 for path, count in fake.read.items() if path.endswith(".safetensors"))


def before(workers: int) -> int:
    """Requests of a restore when every worker looked for checkpoints (a LIST, and a HEAD and a GET of the manifest),
    read all files, and its share of those without weights once more; counted so at commit 7e49dc7 on 1, 2 and 4
    workers.
    """
    return workers * (3 + 4 * workers + 3)


def test_each_file_is_read_once_by_1024_workers(fake: FakeS3):
    simulated_save("s3://d2f/run", MANY)
    fake.read.clear()
    with fake.counted() as requests:
        simulated_restore("s3://d2f/run", MANY)
    assert requests == {"LIST": 1, "GET": 1 + 4 * MANY} and each_once(fake)
    assert sum(requests.values()) <= 0.001 * before(MANY)


def test_where_the_disk_is_nearly_full_a_file_is_read_twice(fake: FakeS3, monkeypatch: pytest.MonkeyPatch):
    simulated_save("s3://d2f/run", 2)
    monkeypatch.setattr(file_share.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with fake.counted() as requests:
        simulated_restore("s3://d2f/run", 2)
    assert requests == {"LIST": 1, "GET": 1 + 2 * 4 * 2}


def test_no_directory_is_listed_while_1024_workers_save(fake: FakeS3):
    with fake.counted() as requests:
        simulated_save("s3://d2f/run", MANY)
    assert requests["PUT"] == 5 * MANY + 1
    assert requests["LIST"] == 2, "those of the retention, of the names of the run's checkpoints"
    assert 3 * MANY - 1 <= requests["HEAD"] <= 16 * MANY and MANY < requests["GET"] <= 16 * MANY


OPERATIONS = {"GetObject": "GET", "PutObject": "PUT", "HeadObject": "HEAD", "ListObjectsV2": "LIST"}


@contextmanager
def own_requests() -> Iterator[Counter[str]]:
    """What this process asks S3 within the context; operations without a short name under their own."""
    from aiobotocore.client import AioBaseClient

    found, original = Counter[str](), AioBaseClient._make_api_call

    async def call(client: Any, operation: str, arguments: Any) -> Any:
        found[OPERATIONS.get(operation, operation)] += 1
        return await original(client, operation, arguments)

    with mock.patch.object(AioBaseClient, "_make_api_call", call):
        yield found


def save_and_restore(rank: int, workers: int, output: str, variables: dict[str, str]) -> list[Counter[str]]:
    """This worker's requests of a save, and of a restore of what was saved."""
    os.environ.update(variables)
    made = task()
    worker = make_worker(rank, made, 2, workers)
    worker.engine.backward(made.loss_fn(worker.engine, rows()).mean())
    worker.engine.step()
    worker.update_averages(1)
    writer = CheckpointWriter(output, "a", rank, workers, Retention())
    with own_requests() as saving:
        writer.save(1, samples=4, identity="run", tensors=worker.share(), state={})
        writer._join()
    torch.distributed.barrier()
    made = task()
    with own_requests() as restoring:
        found = restore.choose(output, "run", made.module, "cpu")
        assert found
        restore.put_back(make_worker(rank, made, 2, workers), made, found, rows())
    return [saving, restoring]


@pytest.fixture(scope="module")
def four() -> Iterator[Workers]:
    workers = Workers(4)
    yield workers
    workers.close()


@pytest.mark.parametrize(("workers", "processes"), [(1, "single"), (2, "pair"), (4, "four")])
def test_workers_ask_s3_as_often_as_was_simulated(
    workers: int, processes: str, s3: StackEnv, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    asked = request.getfixturevalue(processes).run(
        save_and_restore, workers, f"s3://d2f/test-requests/{workers}", dict(s3.variables)
    )
    saving, restoring = (sum((one[part] for one in asked), Counter[str]()) for part in (0, 1))
    simulated = FakeS3()
    monkeypatch.setattr(s3_client, "open_s3", lambda *, attempts: simulated)
    with simulated.counted() as saved:
        simulated_save("s3://d2f/run", workers)
    with simulated.counted() as restored:
        simulated_restore("s3://d2f/run", workers)
    assert restoring == restored == {"LIST": 1, "GET": 1 + 4 * workers}
    assert saving["PUT"] == saved["PUT"] == 5 * workers + 1
    for rank, (one_saving, one_restoring) in enumerate(asked):
        assert one_restoring == {"GET": 4 + (rank == 0), **({"LIST": 1} if rank == 0 else {})}
        assert rank == 0 or one_saving["LIST"] == 0


def test_copies_that_a_killed_worker_has_left_are_deleted_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("killed", "new"):  # one died while it held its lock, the other has not come to take it
        (tmp_path / f"{file_share.SCRATCH}{name}").mkdir()
    (tmp_path / f"{file_share.SCRATCH}killed" / "alive").touch()
    (tmp_path / f"{file_share.SCRATCH}killed" / "object").write_bytes(b"1")
    with file_share.scratch_directory() as one, file_share.scratch_directory() as other:
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {one.name, other.name, f"{file_share.SCRATCH}new"}
    assert [path.name for path in tmp_path.iterdir()] == [f"{file_share.SCRATCH}new"]


def test_a_worker_that_has_not_locked_its_directory_yet_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Workers of a node make their directories at the same time, and each looks for those of dead ones."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    flock, looked = fcntl.flock, []

    def another_looks_first(file: Any, operation: int) -> None:
        if not looked:
            looked.extend(tmp_path.iterdir())
            for place in looked:
                file_share._remove_unless_alive(place)
        flock(file, operation)

    monkeypatch.setattr(file_share.fcntl, "flock", another_looks_first)
    with file_share.scratch_directory() as mine:
        assert looked == [mine] and mine.is_dir()


def test_a_lost_directory_of_copies_is_no_damage_of_the_checkpoint(
    fake: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    simulated_save("s3://d2f/run", 1)
    (found,) = checkpoint.candidates("s3://d2f/run", "run")
    share = FileShare(found, 0, 1)
    share.verify({name: (2,) for name in found.manifest.tensors["weights"]})
    for place in tmp_path.iterdir():
        shutil.rmtree(place)
    share.drop("weights")
    with pytest.raises(OSError, match="was deleted while a checkpoint was restored") as caught:
        share._local(found.manifest.files[0])
    assert not isinstance(caught.value, FileNotFoundError)
    share.close()
