"""Content hash of a directory, and the cache directory of downloads."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

HASHED_SUFFIXES = (".json", ".safetensors", ".txt", ".model")
"""Suffixes of configs, weights and vocabularies, which determine what a model computes; a model card may change."""


def cache_root() -> Path:
    """Directory of downloads: `$D2F_CACHE`, or `~/.cache/diff2flow`."""
    return Path(os.environ.get("D2F_CACHE") or Path.home() / ".cache" / "diff2flow")


@contextlib.contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """File lock: one process per machine creates `target`; check again inside the block whether it exists."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{target}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends
        yield


def file_sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_directory(
    path: Path,
    parts: tuple[str, ...] = ("",),
    sha256: Callable[[Path], str] = file_sha256,
    chosen: Callable[[str], bool] | None = None,
) -> str:
    """sha256 over the sorted (relative name, sha256) of the configs and weights under `path`'s `parts`.

    Args:
        sha256: of a file's contents.
        chosen: of a file's relative name, whether it counts; None: all do.
    """
    digest = hashlib.sha256()
    for part in parts:
        for file in sorted((path / part).rglob("*")):
            name = file.relative_to(path).as_posix()
            if file.is_file() and file.suffix in HASHED_SUFFIXES and (chosen is None or chosen(name)):
                digest.update(f"{name} {sha256(file)}\n".encode())
    return digest.hexdigest()
