"""A model's files on this machine, whole or described: large ones that lie on S3 as their beginning and size alone.

A described directory has every name, every config and every header of the whole one, and takes a few megabytes of disk:
enough for checks, which run on a cluster's head. Where only the contents can tell (hashes are part of what a run is
identified by), they are read from S3 in pieces that are not kept, once per version of the object.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2f_core import storage
from d2f_core.hashing import cache_root, file_sha256, hash_directory
from d2f_core.model.safetensors_header import HeaderError, read_begin

MOST_COPIED = 64 * 2**20
"""Bytes of the largest file that is copied whole: vocabularies are smaller, weights are not."""
PIECE = 32 * 2**20
"""Bytes that are in memory while an object is hashed."""
WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class StoredObject:
    """A version of an object on S3."""

    uri: str
    size: int
    tag: str
    """Its ETag, which another content does not have."""

    @property
    def digest_file(self) -> Path:
        """Where this machine keeps the object's sha256."""
        key = hashlib.sha256(f"{self.uri} {self.tag} {self.size}".encode()).hexdigest()
        return cache_root() / "digests" / key


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A directory of a model, and its hashes."""

    path: Path
    left: Mapping[str, StoredObject] = field(default_factory=dict)
    """By relative name, the files of which the directory has the beginning and the size alone: the rest is zeros."""
    _known: dict[Path, str] = field(default_factory=dict, repr=False, compare=False)

    def sha256(self, file: Path) -> str:
        """sha256 of a file below `path`; that of one that was left on S3 is of the object's bytes.

        Raises:
            StorageError: S3 stays away, or the object was replaced.
        """
        if file not in self._known:
            there = self.left.get(file.relative_to(self.path).as_posix())
            self._known[file] = _remembered_sha256(there) if there else file_sha256(file)
        return self._known[file]

    def require_whole(self) -> Path:
        """`path`, whose files can be loaded; RuntimeError when some of them were left on S3."""
        if self.left:
            raise RuntimeError(
                f"{str(self.path)!r} has the headers of {len(self.left)} files, such as {min(self.left)!r}, without "
                "their contents: it is for checks. Load the model from its URI."
            )
        return self.path

    def hash(self, *parts: str, chosen: Callable[[str], bool] | None = None) -> str:
        """Content hash of the directory, or of some of its parts or names, as by `hash_directory`."""
        return hash_directory(self.path, parts or ("",), self.sha256, chosen)


def describe_tree(uri: str, found: Mapping[str, Mapping[str, Any]], target: Path) -> ModelFiles:
    """The files under an s3:// prefix, described in the directory `target`, which is made unless it is there.

    Args:
        found: properties of the objects under `uri` by path, as `storage.list_tree` gives them.

    Raises:
        StorageError: S3 stays away.
    """
    left = dict(_too_large(uri, found))
    if not target.is_dir():
        storage.download_tree(uri, target, fetch=_fetch)
    return ModelFiles(path=target, left=left)


def _too_large(uri: str, found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, StoredObject]]:
    root = uri.removeprefix("s3://").rstrip("/")
    for path, info in found.items():
        if info["size"] > MOST_COPIED or path.endswith(WEIGHTS):
            yield (
                path.removeprefix(root).lstrip("/"),
                StoredObject(f"s3://{path}", int(info["size"]), str(info.get("ETag"))),
            )


def _fetch(path: str, size: int, local: Path) -> None:
    """Put an object's beginning (of one that is no large file, all of it) at a local path of the object's size."""
    uri = f"s3://{path}"
    if not path.endswith(WEIGHTS):
        begin = storage.read_bytes(uri) if size <= MOST_COPIED else b""
    else:
        try:
            begin = read_begin(lambda start, end: storage.read_bytes(uri, start, end), size)
        except HeaderError:  # whoever reads the file is told the same of it
            begin = storage.read_bytes(uri, 0, 8) if size else b""
    local.write_bytes(begin)
    os.truncate(local, size)


def _remembered_sha256(there: StoredObject) -> str:
    with contextlib.suppress(FileNotFoundError):
        return there.digest_file.read_text()
    digest = hashlib.sha256()
    for start in range(0, there.size, PIECE):
        digest.update(storage.read_bytes(there.uri, start, min(start + PIECE, there.size)))
    now = storage.list_tree(there.uri)
    if [str(info.get("ETag")) for info in now.values()] != [there.tag]:
        raise storage.StorageError(f"{there.uri!r} was replaced while it was read. Run the command again.")
    storage.write_bytes(str(there.digest_file), digest.hexdigest().encode())
    return digest.hexdigest()


def described_file(uri: str, directory: Path) -> Path:
    """A local path of a safetensors file of which the header and the size can be read: the file itself, or of one on
    S3 a copy of its beginning in `directory`.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: S3 stays away.
    """
    if not storage.is_s3(uri):
        local = Path(uri.removeprefix("file://")).expanduser()
        if not local.is_file():
            raise FileNotFoundError(f"{uri!r} does not exist. Check the path.")
        return local
    if (info := storage.list_tree(uri).get(path := uri.removeprefix("s3://"))) is None:
        raise FileNotFoundError(f"{uri!r} does not exist. Check the URI.")
    copy = directory / hashlib.sha256(uri.encode()).hexdigest()[:16] / path.rsplit("/", 1)[-1]
    copy.parent.mkdir(parents=True, exist_ok=True)
    _fetch(path, int(info["size"]), copy)
    return copy
