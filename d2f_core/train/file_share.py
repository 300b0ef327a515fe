"""One worker's share of a checkpoint's files: each file is read from the storage by one worker of the job.

A worker keeps its files from S3 on its disk until the checkpoint is restored, so that none is asked for twice.
"""

import contextlib
import fcntl
import functools
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from d2f_core import storage
from d2f_core.train.checkpoint import (
    KINDS,
    Checkpoint,
    CheckpointFile,
    CheckpointManifest,
    TensorFile,
    check_file,
    fetched_file,
    missing_is_damage,
)
from d2f_core.train.sealed import CheckpointError, damaged
from d2f_core.train.weights import check_shape

OPEN_FILES = 64
SCRATCH = "d2f-restore-"
"""Beginning of the names of directories with copies."""
KEPT_SHARE = 16
"""A file from S3 stays on the disk while this many times its size is free there, for the other workers of the node."""


def share_of(manifest: CheckpointManifest, rank: int, count: int) -> list[CheckpointFile]:
    """The files that worker `rank` of `count` reads: of each kind as many as the others, and no two workers the same.

    Fewer files than workers are divided among all of them, whatever their kind.
    """
    by_kind = [[file for file in manifest.files if file.kind == kind] for kind in KINDS]
    return [
        file
        for number, files in enumerate(by_kind)
        for place, file in enumerate(files)
        if (number * len(files) + place) % count == rank
    ]


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory that goes with the context, or if the process is killed, with the next one that is asked for.

    A worker that runs out of memory when its engine is built is killed while it has copies of gigabytes.
    """
    place = Path(tempfile.mkdtemp(prefix=SCRATCH))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        mine = stack.enter_context((place / "locked").open("w"))
        fcntl.flock(mine, fcntl.LOCK_EX)  # until the process ends, however it does
        # Under its name only now: another worker that finds it unlocked takes its owner for dead.
        (place / "locked").rename(place / "alive")
        for other in place.parent.glob(f"{SCRATCH}*"):
            if other != place:
                _remove_unless_alive(other)
        yield place


def _remove_unless_alive(other: Path) -> None:
    with contextlib.suppress(OSError), (other / "alive").open() as alive:  # another user's, or one that has just gone
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(other)


class FileShare:
    """Reads the tensors of one worker's share, which no other worker reads.

    Attributes:
        holds: (kind, parameter name) of the share's tensors, after `verify`.
        failure: the first error of `read`.
    """

    def __init__(self, found: Checkpoint, rank: int, count: int) -> None:
        self._found, self._files = found, share_of(found.manifest, rank, count)
        self._copies: dict[CheckpointFile, tuple[Path, contextlib.ExitStack]] = {}
        self._scratch, self._directory = contextlib.ExitStack(), None
        self._opened = functools.lru_cache(OPEN_FILES)(lambda file: TensorFile(found, file, self._local(file)))
        self.holds: dict[tuple[str, str], CheckpointFile] = {}
        self.failure: Exception | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}

    def verify(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Read every tensor of the share once, and keep none.

        Args:
            shapes: that of each trained parameter.

        Raises:
            CheckpointError: a file is missing, or its content differs from what was written.
            ParameterMismatchError: a tensor has another shape than its parameter.
            UnreachableStorageError: S3 stays away.
        """
        self._shapes = dict(shapes)
        for file in self._files:
            self._check(file)
            tensors = TensorFile(self._found, file, self._local(file))
            for name in tensors.names:
                tensor = tensors.read(name)
                check_shape(self._found, name, tensor, self._shapes)
                if tensor.dtype != torch.float32:
                    raise damaged(self._found.uri, f"holds {file.kind} of {name!r} as {tensor.dtype}, not in fp32")
                self.holds[file.kind, name] = file
            if file in self._copies and shutil.disk_usage(self._local(file)).free < KEPT_SHARE * file.size:
                self._drop(file)

    def check(self, kind: str) -> None:
        """Compare the hashes of the share's files of one kind again, before they are read. Raises as `verify`."""
        for file in self._files:
            if file.kind == kind:
                self._check(file)

    def read(self, kind: str, name: str) -> Tensor:
        """One tensor that the share `holds`; never raises: `failure` has the first error, and zeros stand for it."""
        try:
            return self._opened(self.holds[kind, name]).read(name)
        except Exception as error:  # every worker raises it, when the exchange is over
            self.failure = self.failure or error
            return torch.zeros(self._shapes[name])

    def drop(self, kind: str) -> None:
        """Delete the copies of one kind's files."""
        self._opened.cache_clear()
        for file in [file for file in self._copies if file.kind == kind]:
            self._drop(file)

    def close(self) -> None:
        """Delete all copies."""
        for kind in KINDS:
            self.drop(kind)
        self._scratch.close()

    def _check(self, file: CheckpointFile) -> None:
        place = storage.join(self._found.uri, file.path)

        def fetch() -> None:
            try:
                with missing_is_damage(place):
                    check_file(place, file, self._local(file))
            except CheckpointError:
                if file in self._copies:
                    self._opened.cache_clear()
                    self._drop(file)
                raise

        fetched_file(place, fetch)

    def _local(self, file: CheckpointFile) -> Path:
        place = storage.join(self._found.uri, file.path)
        if not storage.is_s3(place):
            return Path(storage.filesystem(place)[1])
        if self._directory is None:
            self._directory = self._scratch.enter_context(scratch_directory())
        if not self._directory.is_dir():  # or the object would count as missing, and the checkpoint as damaged
            raise OSError(f"{str(self._directory)!r} was deleted while a checkpoint was restored. Start the run again.")
        if file not in self._copies:
            with contextlib.ExitStack() as stack:
                path = stack.enter_context(storage.local_file(place, self._directory, by_size=False))
                self._copies[file] = path, stack.pop_all()
        return self._copies[file][0]

    def _drop(self, file: CheckpointFile) -> None:
        self._copies.pop(file)[1].close()
