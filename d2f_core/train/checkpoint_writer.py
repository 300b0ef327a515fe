"""Asynchronous checkpoints: a copy in CPU memory, which a thread uploads while the training continues.

Worker r writes its safetensors and then `share-r.json`, which lists them. Worker 0 writes its share first, waits for
all others, merges the lists into the manifest and writes the manifest last. The other workers wait for `share-0.json`
before they write theirs. So shares left behind by an earlier start of the same attempt are never mixed with new ones:
worker 0 finds its own old share and refuses.

Nobody lists the directory, which would cost a request per thousand files: each waits for one key that it knows.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import Tensor

from d2f_core import storage
from d2f_core.identity import canonical_json
from d2f_core.retry import UnreachableError, is_shortage
from d2f_core.train.checkpoint import (
    MANIFEST,
    PLAIN_NAME,
    CheckpointFile,
    CheckpointManifest,
    checkpoints_uri,
    directory_name,
    manifest_bytes,
    tensor_digest,
)
from d2f_core.train.checkpoint_file import FileImage
from d2f_core.train.retention import apply_retention
from d2f_core.train.retention_rules import Retention
from d2f_core.train.sealed import CheckpointError, UnfinishedSaveError, damaged, read_sealed, seal

logger = logging.getLogger(__name__)

SHARE_SECONDS = 600.0
FIRST_POLL_SECONDS = 0.02
LONGEST_POLL_SECONDS, MOST_POLLS_PER_SECOND = 2.0, 50
"""Seconds between two looks for a file of another worker: doubled up to the longest, which grows with the number of
workers so that all of them together ask no more often than this."""
SHARES_AT_A_TIME = 16
"""Shares that worker 0 reads side by side: one after the other, 1024 of them would take half a minute."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Save:
    uri: str
    head: dict[str, Any]
    """What the shares of all workers have in common: step, samples, identity, num_workers."""
    images: dict[str, FileImage]
    """The copy in CPU memory, by kind; one is dropped once it is uploaded."""
    state: dict[str, Any]
    files: Mapping[str, bytes]


class CheckpointWriter:
    """Writes one worker's shares; every worker has one, and calls `save` at the same steps.

    Attributes:
        protected: URIs that retention must not delete; may be changed at any time.
        last_complete: on worker 0, (step, uri) of the newest checkpoint that this writer completed.
    """

    def __init__(
        self,
        output: str,
        attempt: str,
        rank: int,
        num_workers: int,
        retention: Retention,
        *,
        share_seconds: float = SHARE_SECONDS,
        write: Callable[..., None] = storage.write_bytes,
    ) -> None:
        """Create the writer; reads and writes nothing yet.

        Args:
            attempt: part of this attempt's directory names; must differ for every start of the workers.
            share_seconds: how long one worker waits for the others' shares.
            write: `storage.write_bytes`, or one like it.
        """
        if not PLAIN_NAME.fullmatch(attempt):
            raise CheckpointError(f"attempt={attempt!r} is not a plain name. Use letters, digits, '-', '_' and '.'.")
        if not 0 <= rank < num_workers:
            raise CheckpointError(f"rank={rank} must be at least 0 and below num_workers={num_workers}.")
        self.output, self.attempt, self.rank, self.num_workers = output, attempt, rank, num_workers
        self.retention, self.share_seconds = retention, share_seconds
        self.protected: set[str] = set()
        self.last_complete: tuple[int, str] | None = None
        self._write_bytes = write
        self._thread: threading.Thread | None = None
        self._uri: str | None = None
        self._failure: CheckpointError | None = None
        self._closed = threading.Event()

    def save(
        self,
        step: int,
        *,
        samples: int,
        identity: str,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Copy this worker's share, kind -> parameter name -> tensor, and write the copy in the background.

        Blocks until the previous save is done, so that at most one copy is in memory, and until the tensors are copied.
        Kinds without tensors are not written. Worker 0's `state`, plain JSON, goes into the manifest, and its `files`,
        by plain name, beside it.

        Raises:
            CheckpointError: an earlier save failed, or this writer is closed.
            TypeError: `state` is not JSON.
        """
        self._join()
        if self._closed.is_set():
            raise CheckpointError(f"The writer of {self.output} is closed. Make another one, with a new attempt.")
        images = {kind: FileImage(named) for kind, named in tensors.items() if named}
        self._uri = storage.join(checkpoints_uri(self.output), directory_name(step, self.attempt))
        head = {"step": step, "samples": samples, "identity": identity, "num_workers": self.num_workers}
        job = _Save(self._uri, head, images, json_copy(state), files or {})
        # A daemon: a training that ends with an error is not held up; without a manifest nothing was saved.
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Raise the CheckpointError of an earlier save, if there is one; never blocks."""
        if self._failure:
            raise self._failure

    def wait(self) -> None:
        """Block until the last save is complete: its manifest exists, and on worker 0 retention has been applied.

        Raises:
            CheckpointError: the save failed, or the manifest did not appear in time.
        """
        self._join()
        if self.rank and self._uri:
            self._await_file(self._uri, MANIFEST, "manifest")

    def close(self) -> None:
        """End the thread. A save in progress is abandoned and stays incomplete; call `wait` first to complete it."""
        self._closed.set()
        if self._thread:
            self._thread.join()
            self._thread = None

    def _join(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None
        self.poll()

    def _run(self, job: _Save) -> None:
        step = job.head["step"]
        try:
            self._write(job)
        except BaseException as error:  # of any type: the training raises it
            reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            logger.error("saving step %d failed on worker %d: %s", step, self.rank, reason)
            mended = isinstance(error, (UnfinishedSaveError, UnreachableError)) or is_shortage(error)
            kind = UnfinishedSaveError if mended else CheckpointError
            self._failure = kind(f"Saving step {step} failed on worker {self.rank}. {reason}")
            self._failure.__cause__ = error

    def _write(self, job: _Save) -> None:
        share = share_name(self.rank)
        if used := [name for name in (MANIFEST, share) if storage.file_exists(storage.join(job.uri, name))]:
            raise CheckpointError(
                f"{job.uri} has {used[0]} already, so this attempt was started before. Give every start of the workers "
                "an attempt of its own, and save each step once."
            )
        files, digests = [], {}
        for kind in list(job.images):
            self._go_on(job.uri)
            file, digests[kind] = self._write_image(job.uri, kind, job.images.pop(kind))
            files.append(file)
        if self.rank:
            self._await_file(job.uri, share_name(0), "share")
        else:
            for name, data in job.files.items():
                self._create(storage.join(job.uri, name), data)
        fields = {"rank": self.rank, **job.head, "files": [asdict(file) for file in files], "tensors": digests}
        self._create(storage.join(job.uri, share), seal(fields))
        if self.rank == 0:
            self._complete(job)

    def _write_image(self, uri: str, kind: str, image: FileImage) -> tuple[CheckpointFile, dict[str, str]]:
        """Write one kind's file; what the manifest says of it, and of its tensors."""
        digests = {name: tensor_digest(tensor) for name, tensor in image.tensors.items()}
        name = f"{kind}-{self.rank}.safetensors"
        self._write_bytes(storage.join(uri, name), image.content)
        return CheckpointFile(kind=kind, path=name, size=len(image.content), sha256=image.sha256), digests

    def _complete(self, job: _Save) -> None:
        """On worker 0: write the manifest, which completes the checkpoint, then delete old checkpoints."""
        manifest = self._joined(job, self._all_shares(job.uri))
        self._go_on(job.uri)
        self._create(storage.join(job.uri, MANIFEST), manifest_bytes(manifest))
        self.last_complete = (manifest.step, job.uri)
        logger.info("step %d  checkpoint %s", manifest.step, job.uri)
        apply_retention(self.output, self.retention, {*self.protected, job.uri}, up_to_step=manifest.step)

    def _joined(self, job: _Save, shares: list[bytes]) -> CheckpointManifest:
        files: list[CheckpointFile] = []
        tensors: dict[str, dict[str, str]] = {}
        for rank, data in enumerate(shares):
            place = storage.join(job.uri, share_name(rank))
            share = read_sealed(place, data)
            if {name: share.get(name) for name in ("rank", *job.head)} != {"rank": rank, **job.head}:
                raise damaged(place, f"is not worker {rank}'s share of {job.head}")
            files += [CheckpointFile(**file) for file in share["files"]]
            for kind, named in share["tensors"].items():
                if twice := sorted(tensors.setdefault(kind, {}).keys() & named.keys()):
                    raise CheckpointError(f"{place}: {kind} of {twice[0]!r} was saved by two workers; one must own it.")
                tensors[kind] |= named
        return CheckpointManifest(**job.head, files=tuple(files), state=job.state, tensors=tensors)

    def _all_shares(self, uri: str) -> list[bytes]:
        """On worker 0: every worker's share, each read once it is there."""
        deadline = time.monotonic() + self.share_seconds

        def read(rank: int) -> bytes | None:
            return self._awaited(uri, lambda: _read_if_there(storage.join(uri, share_name(rank))), deadline)

        with ThreadPoolExecutor(SHARES_AT_A_TIME) as pool:
            found = list(pool.map(read, range(self.num_workers)))
        if missing := [rank for rank, share in enumerate(found) if share is None]:
            raise self._not_there(uri, "share", missing)
        return [share for share in found if share is not None]

    def _await_file(self, uri: str, name: str, what: str) -> None:
        """Block until worker 0 has written the file `name`."""
        deadline = time.monotonic() + self.share_seconds
        if not self._awaited(uri, lambda: storage.file_exists(storage.join(uri, name)) or None, deadline):
            raise self._not_there(uri, what, [0])

    def _awaited(self, uri: str, look: Callable[[], T | None], deadline: float) -> T | None:
        """What `look` finds, asked again and again; None if it finds nothing before the deadline."""
        delay, longest = FIRST_POLL_SECONDS, max(LONGEST_POLL_SECONDS, self.num_workers / MOST_POLLS_PER_SECOND)
        while (found := look()) is None:
            self._go_on(uri)
            if time.monotonic() >= deadline:
                return None
            self._closed.wait(delay)
            delay = min(2 * delay, longest)
        return found

    def _not_there(self, uri: str, what: str, ranks: list[int]) -> UnfinishedSaveError:
        return UnfinishedSaveError(
            f"{uri}: no {what} of worker {', '.join(map(str, ranks))} after {self.share_seconds:g} s, so this "
            "checkpoint stays incomplete. See in the logs why it ended or cannot write; the run resumes from the one "
            "before."
        )

    def _go_on(self, uri: str) -> None:
        if self._closed.is_set():
            raise CheckpointError(f"{uri}: the writer was closed before the checkpoint was complete.")

    def _create(self, place: str, data: bytes) -> None:
        """Write a file, and refuse one that existed before this save began."""
        try:
            self._write_bytes(place, data, exclusive=True)
        except FileExistsError:
            # A client that retries a request whose response was lost finds its own file.
            if storage.read_bytes(place, small=True) != data:
                raise CheckpointError(
                    f"{place} was written by another process of the same attempt. Give every start of the workers an "
                    "attempt of its own."
                ) from None


def share_name(rank: int) -> str:
    return f"share-{rank}.json"


def _read_if_there(place: str) -> bytes | None:
    try:
        return storage.read_bytes(place, small=True)
    except FileNotFoundError:
        return None


def json_copy(state: Mapping[str, Any]) -> dict[str, Any]:
    """Deep copy of `state` through JSON, as it will be read back. Raises TypeError when `state` is not JSON."""
    return json.loads(canonical_json(dict(state)))
