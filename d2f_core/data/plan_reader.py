"""The rows of a plan in its order: fetched ahead of time within the plan's buffer, and assembled chunk by chunk."""

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from d2f_core.data.chunks import ChunkPlanner, Piece, Run
from d2f_core.data.gather import Gatherer, serialised
from d2f_core.data.manifest import Manifest, ManifestError, read_manifest
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.data.table_history import read_version
from d2f_core.data.table_reader import DamagedDataError, RowRange, TableReader

EPOCH, ROW, REASON = "epoch", "row", "reason"
READING_THREADS = 8
FILES_TRIED = 100
"""Number of files searched for a usable row before a table is given up."""


class ByteLimit:
    """Semaphore counted in bytes: threads wait while the sum would pass the limit; one thread may always proceed."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken, self._changed = limit, 0, threading.Condition()

    @contextmanager
    def taking(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + size <= self._limit)
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


class PlanReader:
    """One worker's rows of a plan, chunk by chunk: tables of a column `micro_batch` of serialised tables.

    A serialised table has the plan's columns and: `epoch`; `row`, unique over all tables of the plan; `reason`, null
    for a usable row. An unusable row keeps its place, filled with the content of another row; the loss must leave it
    out.

    Rows in memory, fetches in progress and assembled chunks together stay within the plan's `buffer_bytes`.

    Args:
        skip: number of the worker's micro-batches, from `first_step` on, that are left out.
    """

    def __init__(self, plan: StreamPlan, rank: int, num_workers: int, first_step: int, skip: int = 0) -> None:
        self._plan = plan
        self._readers = [TableReader(uri, planned_table(plan, uri), plan.columns) for uri in plan.tables]
        self._first_rows = dict(zip(plan.table_of, plan.first_rows, strict=True))
        self._planner = ChunkPlanner(plan, rank, num_workers, first_step, self._readers, skip)
        self._pool = ThreadPoolExecutor(READING_THREADS)
        self._in_flight = ByteLimit(self._planner.fetch_bytes)
        self._pieces: dict[Piece, Future[RowRange]] = {}
        self._gatherer = Gatherer()

    def __iter__(self) -> Iterator[pa.Table]:
        """All chunks, in order."""
        return map(self.read, range(self._planner.num_chunks))

    def read(self, number: int) -> pa.Table:
        """Chunk `number`, counted from the first micro-batch that is not left out."""
        chunk, *later = self._planner.ahead(number)
        wanted = dict.fromkeys(piece for one in (chunk, *later) for piece in one.pieces)
        for piece in self._pieces.keys() - wanted.keys():
            self._pieces.pop(piece).cancel()
        for piece in wanted:  # in the order of their first use
            if piece not in self._pieces:
                self._pieces[piece] = self._pool.submit(self._fetch, piece)
        parts = [serialised(self._assemble(run), self._plan.micro_batch_size) for run in chunk.runs]
        return pa.table({"micro_batch": pa.chunked_array(parts, pa.large_binary())})

    def _fetch(self, piece: Piece) -> RowRange:
        with self._in_flight.taking(piece.in_flight):
            found = self._readers[piece.table].read(piece.first, piece.end)
            return found if piece.kept is None else found.keeping(np.array(piece.kept))

    def _assemble(self, run: Run) -> pa.Table:
        """The rows of a run, one micro-batch after another."""
        rows, parts, reasons = run.rows, [], dict[int, str]()
        for piece, chosen in run.needs:
            found = self._pieces[piece].result()
            places = found.places[rows[chosen] - found.first]
            usable = places >= 0
            parts.append((found.table, places[usable], chosen[usable]))
            reasons |= {row: found.reasons[row] for row in rows[chosen[~usable]].tolist()}
        unusable = np.array([row in reasons for row in rows.tolist()])
        if unusable.all():
            parts.append((self._any_row(run.table, reasons), np.array([0]), np.array([0])))
        if unusable.any():  # fill them with the content of any usable row
            table, places, _ = next(part for part in parts if len(part[1]))
            parts.append((table, places[:1].repeat(unusable.sum()), np.flatnonzero(unusable)))
        table = self._gatherer.gather(parts, len(rows))
        table = table.append_column(EPOCH, pa.array(run.epochs))
        table = table.append_column(ROW, pa.array(rows + self._first_rows[run.table]))
        return table.append_column(REASON, pa.array([reasons.get(row) for row in rows.tolist()], pa.string()))

    def _any_row(self, table: int, reasons: dict[int, str]) -> pa.Table:
        """A usable row for a run that has none: one already in memory, or else one of the first readable file."""
        at_hand = (fetched.result() for piece, fetched in self._pieces.items() if piece.table == table)
        reader = self._readers[table]
        elsewhere = (reader.read(row, row + 1) for row in reader.first_rows_of_files()[:FILES_TRIED])
        for found in itertools.chain(at_hand, elsewhere):
            if len(good := found.places[found.places >= 0]):
                return found.table.slice(int(good[0]), 1)
        raise DamagedDataError(f"None of the rows {sorted(reasons)[:5]}... can be used: {next(iter(reasons.values()))}")


def planned_table(plan: StreamPlan, uri: str) -> Manifest:
    """The manifest of one of the plan's tables, of the version that the run was planned with.

    Raises:
        ManifestError: another table lies there than when the run was planned.
    """
    planned = {source.digest for source in plan.sources if source.uri == uri and source.digest}
    if not planned:
        return read_manifest(uri)
    if len(planned) == 1 and (manifest := read_version(uri, *planned)):
        return manifest
    raise ManifestError(
        f"{uri!r} has the digest {read_manifest(uri).digest} here, and {planned.pop()} where the training started: it "
        "was replaced, or this node reads another place. Put the table back, or train on the new one in another output."
    )
