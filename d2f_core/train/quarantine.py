"""Rows that a training could not use: collected, shared between workers, stored in checkpoints, limited in number.

CHECKPOINT/manifest.json          state: how many, and the first of them with their reasons
           quarantined.parquet    all of them, only if they are more than that
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from d2f_core import storage
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.s3_calls import ChecksumError, fetched_whole
from d2f_core.train.checkpoint import Checkpoint
from d2f_core.train.sealed import DamagedError, damaged

IN_MANIFEST = 1000
"""Most rows in a checkpoint's manifest, which every worker reads, and which is read again to list checkpoints."""
FILE = "quarantined.parquet"
STATE, ALL = "quarantined", "quarantined_file"
"""Names in a checkpoint's state: the first rows with their reasons; size and hash of the file with all of them."""


class QuarantineLimitError(ValueError):
    """More rows are unusable than the configuration allows."""


class QuarantinedRows:
    """Row numbers with their reasons, 12 bytes a row: a training on 1e9 rows may lose 1e7 by the default limit."""

    def __init__(self) -> None:
        self._rows, self._reasons = np.empty(0, np.int64), np.empty(0, np.int32)
        self._texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """(row, reason) by row."""
        for row, reason in zip(self._rows, self._reasons, strict=True):
            yield int(row), self._texts[reason]

    def __contains__(self, row: int) -> bool:
        place = np.searchsorted(self._rows, row)
        return bool(place < len(self._rows) and self._rows[place] == row)

    def update(self, new: Mapping[int, str]) -> None:
        """Add rows; of one that is known already the new reason counts."""
        rows, reasons = np.fromiter(new, np.int64, len(new)), [self._number(text) for text in new.values()]
        everything = np.concatenate([rows, self._rows])
        self._rows, first = np.unique(everything, return_index=True)  # of equal ones the first, which is the new one
        self._reasons = np.concatenate([np.array(reasons, np.int32), self._reasons])[first]

    def _number(self, text: str) -> int:
        if text not in self._numbers:
            self._numbers[text] = len(self._texts)
            self._texts.append(text)
        return self._numbers[text]

    def to_parquet(self) -> bytes:
        reasons = pa.DictionaryArray.from_arrays(pa.array(self._reasons), pa.array(self._texts, pa.string()))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"row": self._rows, "reason": reasons}), sink)
        return sink.getvalue().to_pybytes()


def quarantined_rows(found: Checkpoint) -> Iterator[tuple[int, str]]:
    """(row, reason) of all rows that the training had not been able to use by the checkpoint, by row.

    Raises:
        DamagedError: the file that holds them is not what was written.
    """
    stated = found.manifest.state.get(ALL)
    if stated is None:
        yield from ((int(row), str(reason)) for row, reason in found.manifest.state.get(STATE, []))
        return
    file = pq.ParquetFile(pa.BufferReader(_read(storage.join(found.uri, FILE), stated)))
    for batch in file.iter_batches():
        yield from zip(batch["row"].to_pylist(), batch["reason"].to_pylist(), strict=True)


def _read(place: str, stated: Mapping[str, Any]) -> bytes:
    def fetch() -> bytes:
        data = storage.read_bytes(place)
        if (found := describe(data)) != stated:
            raise damaged(place, f"has {found}, its manifest says {dict(stated)}")
        return data

    try:
        return fetched_whole(place, fetch, DamagedError)
    except FileNotFoundError:
        raise damaged(place, "is missing") from None
    except ChecksumError:
        raise damaged(place, "comes with a wrong checksum, twice") from None


def describe(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


class TrainingQuarantine:
    """All workers' unusable rows with their reasons, each row once even if it was read several times."""

    def __init__(self, num_rows: int, max_share: float) -> None:
        self._known, self._new = QuarantinedRows(), dict[int, str]()
        self._num_rows, self._max_share = num_rows, max_share
        self._file: tuple[int, bytes] = (0, b"")
        """Number of rows in the file that was made last, and its bytes."""

    @classmethod
    def restored(cls, found: Checkpoint | None, plan: StreamPlan, max_share: float) -> "TrainingQuarantine":
        """Raises DamagedError as `quarantined_rows`."""
        made = cls(plan.num_samples, max_share)
        made._known.update(dict(quarantined_rows(found)) if found else {})
        return made

    def add(self, unusable: tuple[tuple[int, str], ...]) -> None:
        self._new.update((row, reason) for row, reason in unusable if row not in self._known)

    def rows(self) -> list[tuple[int, str]]:
        """(row, reason), sorted."""
        return list(self._known)

    def stored(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What a checkpoint keeps: values of its state, and the file beside its manifest, if there are many rows."""
        shown = [pair for _, pair in zip(range(IN_MANIFEST), self._known, strict=False)]
        if len(self._known) <= IN_MANIFEST:
            return {STATE: shown}, {}
        if self._file[0] != len(self._known):
            self._file = len(self._known), self._known.to_parquet()
        return {STATE: shown, ALL: describe(self._file[1])}, {FILE: self._file[1]}

    def exchange(self, device: Any) -> int:
        """Exchange rows with the other workers, and return the total of unusable rows; every worker must call this.

        Raises:
            QuarantineLimitError: too many rows are unusable; raised on every worker at once.
        """
        flag = torch.tensor([len(self._new)], device=device)
        dist.all_reduce(flag)
        if not flag.item():
            return len(self._known)
        parts: list[dict[int, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self._new)
        for part in parts:
            self._known.update(part or {})
        self._new.clear()
        if len(self._known) > self._max_share * self._num_rows:
            shown = "; ".join(f"row {row}: {reason}" for _, (row, reason) in zip(range(3), self._known, strict=False))
            raise QuarantineLimitError(
                f"{len(self._known)} of {self._num_rows} rows are unusable, more than max_quarantined_share="
                f"{self._max_share:g} allows ({shown}). Write the table again, or raise the limit."
            )
        return len(self._known)
