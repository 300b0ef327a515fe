"""Which micro-batches are put together at once, and what has to be fetched for them: by bytes, arithmetic only.

A chunk is a worker's next micro-batches, read and put together at once. The rows that it needs lie in the windows of
the order, a few rows in each of them. There are two ways to get them:

    whole windows   Each is fetched once and stays until no chunk ahead needs it.
    row groups      Where the windows of a chunk do not fit into the plan's buffer: of each row group with wanted rows
                    these rows stay and the others are dropped. The next chunk that wants other rows of it fetches it
                    again, so up to ROWS OF A ROW GROUP times as much is read as is used: 4 times with rows of 2 MB that
                    were written with `manifest.rows_per_group`, 64 times, at worst, with such rows in groups of 64.

Windows fit while (lanes of this worker) x window_rows x (bytes of a row) is less than about half of the buffer. What
leads back to them is a smaller `window_rows`, or a larger buffer; the first decides the order too.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from d2f_core.data.stream_plan import MicroBatch, StreamPlan
from d2f_core.data.table_reader import RowGroup, TableReader

ROWS_PER_CHUNK = 1024
"""At most, however small the rows are."""
CHUNK_SHARE, FETCH_SHARE = 16, 4
"""What part of the buffer a chunk may take, and what is being fetched: a 16th, a quarter. With the default of 2 GiB
chunks of 1024 rows are whole up to 128 KiB a row."""
CHUNK_COPIES = 3
"""Of a chunk that is put together: gathered, serialised, and once more of columns that are no arrays."""
READ_AHEAD_CHUNKS = 4


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one of the plan's tables that are fetched together."""

    source: int
    first: int
    end: int
    """First and one past the last row."""
    kept: tuple[int, ...] | None = None
    """The rows that stay in memory; None: all."""
    size: int = field(default=0, compare=False)
    """Bytes that it takes while it is kept."""
    in_flight: int = field(default=0, compare=False)
    """Bytes that it takes besides while it is fetched: as it lies in the file, and what of it is dropped."""


Needs = list[tuple[Piece, np.ndarray]]
"""What has to be fetched, in the order of first use, and for which places in a sequence of rows."""


@dataclass(frozen=True)
class Run:
    """Consecutive micro-batches of one table, as one sequence of rows."""

    source: int
    epochs: np.ndarray
    rows: np.ndarray
    """Int64 [rows] each."""
    needs: Needs


@dataclass(frozen=True)
class Chunk:
    """Micro-batches that are put together at once."""

    runs: list[Run]

    @property
    def pieces(self) -> list[Piece]:
        return [piece for run in self.runs for piece, _ in run.needs]


def micro_batches_per_chunk(plan: StreamPlan, row_bytes: int) -> int:
    """As many as fit into a chunk, at least one.

    Args:
        row_bytes: of the plan's largest rows.
    """
    rows = min(ROWS_PER_CHUNK, plan.buffer_bytes // CHUNK_SHARE // max(1, row_bytes))
    return max(1, rows // plan.micro_batch_size)


class ChunkPlanner:
    """The chunks of one worker, from a step on. What it says to keep and to fetch stays within the plan's buffer.

    The one exception: a chunk is at least one micro-batch, however large that is.
    """

    def __init__(
        self, plan: StreamPlan, rank: int, num_workers: int, first_step: int, readers: Sequence[TableReader]
    ) -> None:
        self._plan, self._rank, self._num_workers, self._readers = plan, rank, num_workers, readers
        self._first = first_step * plan.per_step(num_workers)
        self._end = plan.num_steps * plan.per_step(num_workers)
        row_bytes = max(reader.row_bytes for reader in readers)
        self._per_chunk = micro_batches_per_chunk(plan, row_bytes)
        chunk = self._per_chunk * plan.micro_batch_size * row_bytes
        self.fetch_bytes = plan.buffer_bytes // FETCH_SHARE
        """Bytes for what is in flight."""
        self._room = plan.buffer_bytes - self.fetch_bytes - CHUNK_COPIES * chunk
        """Bytes for what is kept."""
        self._chunks: dict[int, Chunk] = {}

    def ahead(self, number: int) -> list[Chunk]:
        """A chunk and those behind it that should be fetched by now: `READ_AHEAD_CHUNKS`, or as many as there is room.

        A chunk that was among those of the chunk before is among these.
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
        by_source = [(source, list(ones)) for source, ones in groupby(micro_batches, key=lambda one: one.source)]
        whole = Chunk([self._run(source, ones, self._windows) for source, ones in by_source])
        if sum(piece.size for piece in set(whole.pieces)) <= self._room:
            return whole
        return Chunk([self._run(source, ones, self._row_groups) for source, ones in by_source])

    def _run(self, source: int, micro_batches: list[MicroBatch], find: Callable[[int, np.ndarray], Needs]) -> Run:
        epochs, rows = (np.concatenate([getattr(one, name) for one in micro_batches]) for name in ("epochs", "rows"))
        return Run(source, epochs, rows, find(source, rows))

    def _windows(self, source: int, rows: np.ndarray) -> Needs:
        order, reader = self._plan.sources[source].order, self._readers[source]
        needs = []
        for window, places in _places_by_label(order.window_of(rows)):
            first, end = order.window_bounds(window)
            low, high = _groups_around(reader, first, end)
            size = (high.end - low.first) * reader.row_bytes
            needs.append((Piece(source, first, end, size=size, in_flight=size), places))
        return needs

    def _row_groups(self, source: int, rows: np.ndarray) -> Needs:
        reader, needs = self._readers[source], []
        for number, places in _places_by_label(reader.groups_of(rows)):
            (group,) = reader.row_groups(number, number)
            kept = tuple(sorted(set(rows[places].tolist())))
            size, fetched = (rows * reader.row_bytes for rows in (len(kept), group.end - group.first))
            needs.append((Piece(source, group.first, group.end, kept, size, 2 * fetched), places))
        return needs


def _places_by_label(labels: np.ndarray) -> Iterable[tuple[int, np.ndarray]]:
    """Each label, in the order of first use, and where it stands."""
    return [(label, np.flatnonzero(labels == label)) for label in dict.fromkeys(labels.tolist())]


def _groups_around(reader: TableReader, first: int, end: int) -> tuple[RowGroup, RowGroup]:
    """The first and the last row group of some rows: all of them stay in memory, for a slice of them holds them all."""
    numbers = reader.groups_of(np.array([first, end - 1])).tolist()
    (low,), (high,) = (reader.row_groups(number, number) for number in numbers)
    return low, high
