"""Checkpoints: one set of safetensors by parameter name, independent of the number of workers and the ZeRO stage.

    OUTPUT/checkpoints/step-00000500.ATTEMPT/weights-0.safetensors    fp32 weights, one file per worker's share
                                             exp_avg-0.safetensors    optimizer moments
                                             exp_avg_sq-0.safetensors
                                             ema-0.safetensors        averages
                                             share-0.json             worker 0's files are there, and their hashes
                                             quarantined.parquet      unusable rows, if they are many
                                             manifest.json            written last, once: all hashes, step, samples
                                             evaluation.json          metrics, by a later validation, once

A directory without a manifest does not exist. Nothing is ever overwritten: each attempt at a step has its own
directory. Every byte that is read back is covered by a sha256. `checkpoint_writer` writes, `retention` deletes.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import dacite
import torch
from safetensors import safe_open
from torch import Tensor

from d2f_core import storage
from d2f_core.hashing import file_sha256
from d2f_core.identity import canonical_json
from d2f_core.s3_calls import ChecksumError, fetched_whole
from d2f_core.train.sealed import (
    FORMAT_VERSION,
    CheckpointError,
    DamagedError,
    OtherFormatError,
    damaged,
    other_format,
    read_sealed,
    seal,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

MANIFEST = "manifest.json"
KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")
DIRECTORY = re.compile(r"step-(\d{8,})\.(\w[\w.-]*)")
PLAIN_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """One safetensors file of a checkpoint."""

    kind: str
    path: str
    """File name inside the checkpoint's directory."""
    size: int
    """File size in bytes."""
    sha256: str

    def __post_init__(self) -> None:
        if not PLAIN_NAME.fullmatch(self.path):
            raise CheckpointError(
                f"path={self.path!r} of a checkpoint's file is not a plain name inside its directory. Refused; delete "
                "this checkpoint's directory."
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    step: int
    """Optimizer steps done."""
    samples: int
    """Position in the data order: samples consumed."""
    identity: str
    """Hash of everything that must not change within a run: model, data, loss, seed, batch size."""
    num_workers: int
    files: tuple[CheckpointFile, ...]
    state: dict[str, Any]
    """JSON values that resuming needs in addition to the tensors."""
    tensors: dict[str, dict[str, str]]
    """Kind -> parameter name -> `tensor_digest`."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    uri: str
    manifest: CheckpointManifest


def checkpoints_uri(output: str) -> str:
    return storage.join(output, "checkpoints")


def directory_name(step: int, attempt: str) -> str:
    return f"step-{step:08d}.{attempt}"


def directories(output: str) -> Iterator[tuple[int, str]]:
    """(step, uri) of every checkpoint directory, complete or not, by step and attempt; other names are ignored."""
    root = checkpoints_uri(output)
    matches = [match for name in storage.list_names(root) if (match := DIRECTORY.fullmatch(name))]
    for match in sorted(matches, key=lambda match: (int(match[1]), match[2])):
        yield int(match[1]), storage.join(root, match[0])


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and raw bytes on any device; equal only for equal bits."""
    header = canonical_json([str(tensor.dtype), list(tensor.shape)])
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(header)
    digest.update(raw.numpy().data)
    return digest.hexdigest()


def manifest_bytes(manifest: CheckpointManifest) -> bytes:
    return seal(asdict(manifest))


def read_checkpoint(uri: str) -> Checkpoint:
    """The checkpoint in one directory.

    Raises:
        FileNotFoundError: the directory has no manifest, so the checkpoint does not exist.
        OtherFormatError: another release wrote it.
        CheckpointError: the manifest is damaged, or belongs to another step's directory.
    """
    place = storage.join(uri, MANIFEST)
    fields = read_sealed(place)
    if (version := fields.get("format_version")) != FORMAT_VERSION:
        raise other_format(place, version)
    try:
        manifest = dacite.from_dict(CheckpointManifest, fields, dacite.Config(strict=True, cast=[tuple]))
    except (dacite.DaciteError, TypeError) as error:
        raise damaged(place, f"is not a checkpoint's manifest ({error})") from None
    named = DIRECTORY.fullmatch(uri.rstrip("/").rsplit("/", 1)[-1])
    if named and int(named[1]) != manifest.step:
        raise damaged(place, f"is of step {manifest.step}, not {int(named[1])}")
    return Checkpoint(uri.rstrip("/"), manifest)


def list_checkpoints(output: str) -> list[Checkpoint]:
    """Every complete checkpoint, sorted by step and attempt.

    A checkpoint with a damaged manifest is left out, with a warning that names it.

    Raises:
        OtherFormatError: another release wrote one of them; if it were left out, its run would restart from scratch.
    """
    found = []
    for _, uri in directories(output):
        try:
            found.append(read_checkpoint(uri))
        except (FileNotFoundError, NotADirectoryError):
            continue  # a save that did not finish
        except OtherFormatError:
            raise
        except CheckpointError as error:
            logger.warning("left out %s: %s", uri, error)
    return found


def candidates(output: str, identity: str) -> list[Checkpoint]:
    """The complete checkpoints of the run `identity`, newest first; resume from the first whose tensors can be read.

    Raises:
        CheckpointError: the output holds a run of another configuration.
    """
    found = list_checkpoints(output)[::-1]
    if found and (other := found[0].manifest.identity) != identity:
        raise CheckpointError(
            f"{output} holds a run with another model, data, loss, seed or batch (identity {other[:12]}, "
            f"this one is {identity[:12]}). Choose another --output, or go back to that run's config.yaml."
        )
    return [checkpoint for checkpoint in found if checkpoint.manifest.identity == identity]


def iter_tensors(checkpoint: Checkpoint, kind: str) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, tensor) of one kind, file by file; empty if the kind was not saved.

    One tensor is in memory at a time; a file on S3 is downloaded to the local disk while it is read. Each file's hash
    is checked before its first tensor is yielded, and each tensor's before the tensor is. Missing tensors are detected
    only at the end.

    Raises:
        CheckpointError: a file is missing, or its content differs from what was written.
    """
    left = dict(checkpoint.manifest.tensors.get(kind, {}))
    for file in (file for file in checkpoint.manifest.files if file.kind == kind):
        place = storage.join(checkpoint.uri, file.path)
        with _whole_copy(place, file) as local:
            tensors = TensorFile(checkpoint, file, local)
            for name in tensors.names:
                tensor = tensors.read(name)
                if left.pop(name, None) is None:
                    raise damaged(checkpoint.uri, f"holds {kind} of {name!r} twice")
                yield name, tensor
    if left:
        raise damaged(checkpoint.uri, f"lacks {kind} of {min(left)!r} ({len(left)} such names)")


def read_tensors(checkpoint: Checkpoint, kind: str) -> dict[str, Tensor]:
    """All parameters' tensors of one kind, checked as by `iter_tensors`; empty if the kind was not saved."""
    return dict(iter_tensors(checkpoint, kind))


@contextlib.contextmanager
def _whole_copy(place: str, file: CheckpointFile) -> Iterator[Path]:
    """Path of the file on this machine, as its manifest describes it."""
    with contextlib.ExitStack() as stack:

        def fetch() -> Path:
            with contextlib.ExitStack() as until_checked, missing_is_damage(place):
                local = until_checked.enter_context(storage.local_file(place, by_size=False))
                check_file(place, file, local)
                stack.push(until_checked.pop_all())
            return local

        yield fetched_file(place, fetch)


def fetched_file(place: str, fetch: Callable[[], T]) -> T:
    """What `fetch` returns, which raises DamagedError when other bytes came; then it is called once more."""
    try:
        return fetched_whole(place, fetch, DamagedError)
    except ChecksumError:
        raise damaged(place, "comes with a wrong checksum, twice") from None


@contextlib.contextmanager
def missing_is_damage(place: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise damaged(place, "is missing") from None


def check_file(place: str, file: CheckpointFile, local: Path) -> None:
    """Raise CheckpointError unless `local`, a copy of the file at `place`, has the manifest's size and hash."""
    size, digest = local.stat().st_size, file_sha256(local)
    if (size, digest) != (file.size, file.sha256):
        stated = file.sha256[:12]
        raise damaged(place, f"has sha256 {digest[:12]} and {size} bytes, its manifest says {stated} and {file.size}")


class TensorFile:
    """An open file of a checkpoint, whose size and hash are right; a tensor is checked when it is read."""

    def __init__(self, checkpoint: Checkpoint, file: CheckpointFile, local: Path) -> None:
        self._uri, self._kind = checkpoint.uri, file.kind
        self._place = storage.join(checkpoint.uri, file.path)
        self._digests = checkpoint.manifest.tensors.get(file.kind, {})
        with self._parsing():  # read, not memory-mapped: mapped pages count as memory, and could change after the check
            self._tensors = safe_open(local, "pt", backend="pread")
            self.names: list[str] = list(self._tensors.keys())

    def read(self, name: str) -> Tensor:
        if name not in self._digests:
            raise damaged(self._uri, f"holds against its manifest {self._kind} of {name!r}")
        with self._parsing():
            tensor = self._tensors.get_tensor(name)
        if (found := tensor_digest(tensor)) != (stated := self._digests[name]):
            raise damaged(self._uri, f"has {self._kind} of {name!r} with digest {found[:12]}, not {stated[:12]}")
        return tensor

    @contextlib.contextmanager
    def _parsing(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, OSError):  # of this machine: size and hash are right
            raise
        except Exception as error:  # the parser and torch raise many types for an invalid file
            raise damaged(self._place, f"is not safetensors ({type(error).__name__}: {error})") from None
