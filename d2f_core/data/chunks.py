"""Which micro-batches are assembled together, and what must be fetched for them: arithmetic on byte sizes, no I/O.

A chunk is a run of a worker's next micro-batches that are read and assembled together. Its rows lie in the windows of
the sample order, a few rows in each window. There are two ways to get them:

    whole windows   Each is fetched once and stays until no chunk ahead needs it.
    row groups      Where the windows of a chunk do not fit into the plan's buffer, or a source's rows lie apart in the
                    table: of each row group with wanted rows
                    these rows stay and the others are dropped. The next chunk that wants other rows of it fetches it
                    again, so up to ROWS OF A ROW GROUP times as much is read as is used: 4 times with rows of 2 MB that
                    were written with `manifest.rows_per_group`, 64 times, at worst, with such rows in groups of 64.

Windows fit while (lanes of this worker) x window_rows x (bytes of a row) is less than about half of the buffer. If they
do not fit, use a smaller `window_rows`, which also changes the sample order, or a larger buffer.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeVar

import numpy as np

from d2f_core.data.stream_plan import MicroBatch, StreamPlan
from d2f_core.data.table_reader import TableReader

Label = TypeVar("Label", bound=Hashable)

ROWS_PER_CHUNK = 1024
"""Most rows in a chunk, however small the rows are."""
CHUNK_SHARE, FETCH_SHARE = 16, 4
"""Divisors of the buffer: a chunk may take a 16th of it, fetches in progress a quarter. With the default of 2 GiB, a
chunk holds its 1024 rows up to 128 KiB a row."""
CHUNK_COPIES = 3
"""Copies of a chunk in memory while it is assembled: gathered, serialised, and one more of its non-array columns."""
READ_AHEAD_CHUNKS = 4


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one of the plan's tables that are fetched together."""

    table: int
    first: int
    end: int
    """`first` is the first row, `end` one past the last."""
    kept: tuple[int, ...] | None = None
    """Row numbers that stay in memory; None: all rows."""
    size: int = field(default=0, compare=False)
    """Bytes in memory while the piece is kept."""
    in_flight: int = field(default=0, compare=False)
    """Additional bytes during the fetch: the piece's bytes in the file, and the rows that are dropped afterwards."""


Needs = list[tuple[Piece, np.ndarray]]
"""Pieces to fetch, in order of first use, each with the places in the run's sequence of rows that it fills."""


@dataclass(frozen=True)
class Run:
    """Consecutive micro-batches of one table, as one sequence of rows."""

    table: int
    epochs: np.ndarray
    rows: np.ndarray
    """`epochs` and `rows` are int64 [rows]; `rows` are row numbers of the table."""
    needs: Needs


@dataclass(frozen=True)
class Chunk:
    """Micro-batches that are assembled together."""

    runs: list[Run]

    @property
    def pieces(self) -> list[Piece]:
        return [piece for run in self.runs for piece, _ in run.needs]


def micro_batches_per_chunk(plan: StreamPlan, row_bytes: int) -> int:
    """Number of micro-batches that fit into a chunk, at least one.

    Args:
        row_bytes: bytes of one row in the table with the largest rows.
    """
    rows = min(ROWS_PER_CHUNK, plan.buffer_bytes // CHUNK_SHARE // max(1, row_bytes))
    return max(1, rows // plan.micro_batch_size)


class ChunkPlanner:
    """The chunks of one worker from a given step on; what is kept and fetched for them stays within the plan's buffer.

    The one exception: a chunk is at least one micro-batch, however large that is.

    Args:
        skip: number of the worker's micro-batches, from `first_step` on, that are left out.
    """

    def __init__(
        self,
        plan: StreamPlan,
        rank: int,
        num_workers: int,
        first_step: int,
        readers: Sequence[TableReader],
        skip: int = 0,
    ) -> None:
        self._plan, self._rank, self._num_workers, self._readers = plan, rank, num_workers, readers
        self._first = first_step * plan.per_step(num_workers) + skip
        self._end = plan.num_steps * plan.per_step(num_workers)
        row_bytes = max(reader.row_bytes for reader in readers)
        self._per_chunk = micro_batches_per_chunk(plan, row_bytes)
        chunk = self._per_chunk * plan.micro_batch_size * row_bytes
        self.fetch_bytes = plan.buffer_bytes // FETCH_SHARE
        """Bytes available to fetches in progress."""
        self._room = plan.buffer_bytes - self.fetch_bytes - CHUNK_COPIES * chunk
        """Bytes available to pieces that are kept."""
        self._chunks: dict[int, Chunk] = {}

    @property
    def num_chunks(self) -> int:
        return max(0, -(-(self._end - self._first) // self._per_chunk))

    def ahead(self, number: int) -> list[Chunk]:
        """Chunk `number` and the chunks after it to fetch now: up to `READ_AHEAD_CHUNKS`, fewer if the buffer is full.

        The later chunks that were returned for `number - 1` are returned for `number` too, so no fetch is cancelled in
        vain.
        """
        found, planned, kept, room = [], {}, set[Piece](), self._room
        for later in range(number, number + 1 + READ_AHEAD_CHUNKS):
            chunk = planned[later] = self._chunks.get(later) or self._chunk(later)
            new = set(chunk.pieces) - kept
            room -= sum(piece.size for piece in new)
            if found and room < 0:
                break
            kept |= new
            found.append(chunk)
        self._chunks = planned
        return found

    def _chunk(self, number: int) -> Chunk:
        first = self._first + number * self._per_chunk
        numbers = range(first, min(first + self._per_chunk, self._end))
        micro_batches = [self._plan.micro_batch(one, self._rank, self._num_workers) for one in numbers]
        tables = groupby(micro_batches, key=lambda one: self._plan.table_of[one.source])
        by_table = [(table, list(ones)) for table, ones in tables]
        if any(self._plan.sources[one.source].rows for one in micro_batches):
            return Chunk([self._run(table, ones, self._row_groups) for table, ones in by_table])
        whole = Chunk([self._run(table, ones, self._windows) for table, ones in by_table])
        if sum(piece.size for piece in set(whole.pieces)) <= self._room:
            return whole
        return Chunk([self._run(table, ones, self._row_groups) for table, ones in by_table])

    def _run(self, table: int, micro_batches: list[MicroBatch], find: Callable[[list[MicroBatch]], Needs]) -> Run:
        epochs, rows = (np.concatenate([getattr(one, name) for one in micro_batches]) for name in ("epochs", "rows"))
        return Run(table, epochs, rows, find(micro_batches))

    def _windows(self, micro_batches: list[MicroBatch]) -> Needs:
        """The windows that hold the micro-batches' rows."""
        labels = [
            (one.source, window)
            for one in micro_batches
            for window in self._plan.sources[one.source].window_of(one.rows).tolist()
        ]
        needs = []
        for (source, window), places in _places_by_label(labels):
            table, (first, end) = self._plan.table_of[source], self._plan.sources[source].window_bounds(window)
            size = _rows_around(self._readers[table], first, end) * self._readers[table].row_bytes
            needs.append((Piece(table, first, end, size=size, in_flight=size), places))
        return needs

    def _row_groups(self, micro_batches: list[MicroBatch]) -> Needs:
        """The row groups that hold the micro-batches' rows; of each group only these rows are kept."""
        table, needs = self._plan.table_of[micro_batches[0].source], []
        rows, reader = np.concatenate([one.rows for one in micro_batches]), self._readers[table]
        for number, places in _places_by_label(reader.groups_of(rows).tolist()):
            (group,) = reader.row_groups(number, number)
            kept = tuple(sorted(set(rows[places].tolist())))
            size, fetched = (count * reader.row_bytes for count in (len(kept), group.end - group.first))
            needs.append((Piece(table, group.first, group.end, kept, size, 2 * fetched), places))
        return needs


def _places_by_label(labels: Iterable[Label]) -> list[tuple[Label, np.ndarray]]:
    """Each distinct label, in order of first use, with its positions (int64) in `labels`."""
    places = defaultdict[Label, list[int]](list)
    for place, label in enumerate(labels):
        places[label].append(place)
    return [(label, np.array(found)) for label, found in places.items()]


def _rows_around(reader: TableReader, first: int, end: int) -> int:
    """Number of rows in the row groups that hold rows `first` to `end` - 1. All stay in memory: a slice references them
    all.
    """
    numbers = reader.groups_of(np.array([first, end - 1])).tolist()
    (low,), (high,) = (reader.row_groups(number, number) for number in numbers)
    return high.end - low.first
