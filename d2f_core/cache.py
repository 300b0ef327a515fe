"""The models that this machine keeps in `$D2F_CACHE/models`: where each is from, when it was last read, and room.

Where `D2F_CACHE_GB` sets a limit, those are removed that were given out longest ago. What was given out within the last
hour stays: a process may be about to load it.
"""

import contextlib
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2f_core.hashing import cache_root, one_at_a_time

logger = logging.getLogger(__name__)

LIMIT = "D2F_CACHE_GB"
"""Environment variable: gigabytes that kept models may take."""
IDLE_HOURS = 1.0
"""A directory that was given out more recently is not removed."""
SOURCE = ".source"
"""After a directory's name: the file beside it that says where it is from."""


class CacheError(ValueError):
    """The limit of the cache is no number; the message gives the value and the fix."""


@dataclass(frozen=True, kw_only=True)
class KeptModel:
    """A directory in the cache."""

    path: Path
    source: str
    """URI that it was copied or converted from; empty: made by a release that did not note it."""
    size: int
    """Bytes of its own: of files that it links to, none."""
    used: float
    """Seconds since the epoch when it was last given out."""


def kept(target: Path, source: str) -> Path:
    """Note that `target`, a directory in the cache, is given out now; call it while `one_at_a_time(target)` is held.

    Args:
        source: URI that it was copied or converted from.
    """
    with contextlib.suppress(PermissionError):  # a cache that another user fills, and prunes
        os.utime(target)
        note = Path(f"{target}{SOURCE}")
        if not note.is_file():
            note.write_text(source)
    return target


def make_room(root: Path) -> None:
    """Keep the limit that the environment sets, if it does; call it after a directory was added, and without its lock.

    Raises:
        CacheError: the limit is no positive number.
    """
    if math.isfinite(limit := limit_gigabytes()):
        prune(root, limit)


def limit_gigabytes() -> float:
    """The limit that the environment sets; infinite if none.

    Raises:
        CacheError: it is no positive number.
    """
    text = os.environ.get(LIMIT) or "inf"
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not limit > 0:
        raise CacheError(f"{LIMIT}={text!r} must be a positive number of gigabytes, such as 100.")
    return limit


def kept_models(root: Path | None = None) -> list[KeptModel]:
    """All of them, those first that were read longest ago."""
    return sorted(_found(root or cache_root() / "models"), key=lambda each: each.used)


def _found(root: Path) -> Iterator[KeptModel]:
    for path in root.glob("*"):
        if path.is_dir() and not path.name.startswith(".") and not path.name.endswith(".partial"):
            note = Path(f"{path}{SOURCE}")
            yield KeptModel(
                path=path,
                source=note.read_text() if note.is_file() else "",
                size=sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink()),
                used=path.stat().st_mtime,
            )


def to_remove(found: Sequence[KeptModel], gigabytes: float, idle_hours: float = IDLE_HOURS) -> list[KeptModel]:
    """Which of `found`, in the order of `kept_models`, have to go so that the rest takes no more than `gigabytes`."""
    total, chosen = sum(each.size for each in found), list[KeptModel]()
    for each in found:
        if total <= 1e9 * gigabytes or time.time() - each.used < 3600 * idle_hours:
            break
        chosen.append(each)
        total -= each.size
    return chosen


def prune(root: Path | None, gigabytes: float, idle_hours: float = IDLE_HOURS) -> list[KeptModel]:
    """Remove what was given out longest ago, until the rest takes no more than `gigabytes`; returns what was removed.

    Args:
        root: directory of kept models; None: this machine's.
        idle_hours: what was given out more recently stays, whatever it takes.
    """
    removed = []
    for each in to_remove(kept_models(root), gigabytes, idle_hours):
        with one_at_a_time(each.path):  # nobody gives it out meanwhile
            if not each.path.is_dir() or each.path.stat().st_mtime != each.used:
                continue
            gone = each.path.with_name(f".{each.path.name}.removed")
            each.path.rename(gone)
            Path(f"{each.path}{SOURCE}").unlink(missing_ok=True)
        shutil.rmtree(gone)
        removed.append(each)
        logger.info("removed %s (%s, %.2f GB) from the cache", each.path.name, each.source, each.size / 1e9)
    return removed
