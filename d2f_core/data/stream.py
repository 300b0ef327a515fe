"""A planned order of rows, read by Ray Data.

Each worker of a training has a dataset of its own, made from the plan: numbers of micro-batches go through an actor
that knows which rows they are, reads the windows that hold them ahead of time, and puts them together. Ray Data brings
the actor, its restarts, prefetching and back-pressure; the order is the plan's.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback  # Ray exports it nowhere else

from d2f_core.data.arrays import array_bytes
from d2f_core.data.manifest import read_manifest
from d2f_core.data.prefetch import Prefetcher
from d2f_core.data.schema import is_array
from d2f_core.data.stream_plan import MicroBatch, StreamPlan
from d2f_core.data.table_reader import DamagedDataError, RowRange, TableReader

EPOCH, ROW, REASON = "epoch", "row", "reason"
ROWS_PER_CHUNK = 1024
READ_AHEAD_CHUNKS = 4
READING_THREADS = 8
CHUNKS_PER_TASK = 4
MAX_TASKS = 2000
"""Reading tasks of one worker; the chunks of a longer training share them."""
BLOCK_BYTES = 32 * 2**20
"""Size at which a reading task hands rows on, before it has read all of its own. A block takes some 70 ms through Ray
Data whatever its size: with half of this, half as many rows arrive in a second."""
READY_BYTES = 2**30
"""Micro-batches that may wait for one worker, in the object store."""
MICRO_BATCHES_AHEAD = 2
"""Taken out of their block before the training wants them."""
BUSY_STEP = 0.01
"""Seconds: an executor's step that took less, and moved no block, had nothing to do."""
SHORTEST_REST, LONGEST_REST = 0.0005, 0.03
"""Idle back-off in seconds: starts at SHORTEST_REST and doubles up to LONGEST_REST."""


@dataclass(frozen=True)
class Chunk:
    """Micro-batches that are put together at once."""

    micro_batches: list[MicroBatch]
    windows: list[tuple[int, int]]
    """(table, window) that they need, in the order of first use."""


class PlanReader:
    """Ray Data actor: numbers of chunks of micro-batches -> one serialised table per micro-batch.

    A table has the plan's columns and: `epoch`; `row`, unique over all tables of the plan; `reason`, null for a row
    that can be used. One that cannot keeps its place, filled with the content of another row, and must not count.
    """

    def __init__(self, plan: StreamPlan, rank: int, num_workers: int, first_step: int) -> None:
        self._plan, self._rank, self._num_workers = plan, rank, num_workers
        self._first = first_step * plan.per_step(num_workers)
        self._end = plan.num_steps * plan.per_step(num_workers)
        self._per_chunk = chunk_size(plan)
        self._readers = [TableReader(s.uri, read_manifest(s.uri), plan.columns) for s in plan.sources]
        self._pool = ThreadPoolExecutor(READING_THREADS)
        self._windows: dict[tuple[int, int], Future[RowRange]] = {}
        self._chunks: dict[int, Chunk] = {}
        self._buffers: dict[tuple[str, int], np.ndarray] = {}

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for chunk in batch["chunk"].tolist():
            yield self._read(chunk)

    def _read(self, chunk: int) -> pa.Table:
        ahead = range(chunk, chunk + 1 + READ_AHEAD_CHUNKS)
        self._chunks = {number: self._chunks.get(number) or self._plan_chunk(number) for number in ahead}
        wanted = dict.fromkeys(key for number in ahead for key in self._chunks[number].windows)
        for key in self._windows.keys() - wanted.keys():
            self._windows.pop(key).cancel()
        for key in wanted:  # in the order of their first use
            if key not in self._windows:
                self._windows[key] = self._pool.submit(self._read_window, *key)
        parts = []
        for source, micro_batches in groupby(self._chunks[chunk].micro_batches, key=lambda one: one.source):
            parts.append(_serialised(self._assemble(source, list(micro_batches)), self._plan.micro_batch_size))
        return pa.table({"micro_batch": pa.chunked_array(parts, pa.large_binary())})

    def _plan_chunk(self, number: int) -> "Chunk":
        first = self._first + number * self._per_chunk
        numbers = range(first, min(first + self._per_chunk, self._end))
        micro_batches = [self._plan.micro_batch(one, self._rank, self._num_workers) for one in numbers]
        keys = []
        for one in micro_batches:
            windows = self._plan.sources[one.source].order.window_of(one.rows)
            keys += [(one.source, window) for window in windows.tolist()]
        return Chunk(micro_batches, list(dict.fromkeys(keys)))

    def _read_window(self, source: int, window: int) -> RowRange:
        return self._readers[source].read(*self._plan.sources[source].order.window_bounds(window))

    def _assemble(self, source: int, micro_batches: list[MicroBatch]) -> pa.Table:
        """Micro-batches of one table, one after another."""
        rows = np.concatenate([one.rows for one in micro_batches])
        windows = self._plan.sources[source].order.window_of(rows)
        parts, reasons = [], {}
        for window in dict.fromkeys(windows.tolist()):
            found, chosen = self._windows[source, window].result(), np.flatnonzero(windows == window)
            places = found.places[rows[chosen] - found.first]
            usable = places >= 0
            parts.append((found.table, places[usable], chosen[usable]))
            reasons |= {row: found.reasons[row] for row in rows[chosen[~usable]].tolist()}
        unusable = np.array([row in reasons for row in rows.tolist()])
        if unusable.all():
            parts.append((self._any_row(source, reasons), np.array([0]), np.array([0])))
        if unusable.any():  # filled with the content of any other row
            table, places, _ = next(part for part in parts if len(part[1]))
            parts.append((table, places[:1].repeat(unusable.sum()), np.flatnonzero(unusable)))
        table = self._gather(parts, len(rows))
        table = table.append_column(EPOCH, pa.array(np.concatenate([one.epochs for one in micro_batches])))
        table = table.append_column(ROW, pa.array(rows + self._plan.first_rows[source]))
        return table.append_column(REASON, pa.array([reasons.get(row) for row in rows.tolist()], pa.string()))

    def _gather(self, parts: list[tuple[pa.Table, np.ndarray, np.ndarray]], rows: int) -> pa.Table:
        """Rows of several tables of one schema together: each part is (table, rows of it, their rows in the result).

        Array columns are copied once, row by row, into memory that the next call overwrites.
        """
        schema, columns = parts[0][0].schema, []
        source, filled = np.empty(rows, np.int64), 0
        for _, places, target in parts:
            source[target] = np.arange(filled, filled + len(places))
            filled += len(places)
        for field in schema:
            if is_array(field):
                out = self._scratch(field.name, rows, field.type.byte_width)
                for table, places, target in parts:
                    _copy_rows(table.column(field.name), places, out, target)
                columns.append(pa.Array.from_buffers(field.type, rows, [None, pa.py_buffer(out)]))
            else:
                taken = [table.column(field.name).take(pa.array(places)) for table, places, _ in parts]
                chunks = [chunk for column in taken for chunk in column.chunks]
                columns.append(pa.chunked_array(chunks, field.type).take(pa.array(source)).combine_chunks())
        return pa.table(columns, schema=schema)

    def _scratch(self, name: str, rows: int, width: int) -> np.ndarray:
        """Memory that is touched already: new pages cost as much time as the copy itself."""
        have = self._buffers.get((name, width))
        if have is None or len(have) < rows:
            have = self._buffers[name, width] = np.empty((rows, width), np.uint8)
        return have[:rows]

    def _any_row(self, source: int, reasons: dict[int, str]) -> pa.Table:
        """A row that can be used, where none of a chunk can."""
        for (of, _), window in self._windows.items():
            if of == source and (good := window.result().places >= 0).any():
                found = window.result()
                return found.table.slice(int(found.places[good][0]), 1)
        raise DamagedDataError(f"None of the rows {sorted(reasons)[:5]}... can be used: {next(iter(reasons.values()))}")


def chunk_size(plan: StreamPlan) -> int:
    """Micro-batches that are put together at once."""
    return max(1, ROWS_PER_CHUNK // plan.micro_batch_size)


def _copy_rows(column: pa.ChunkedArray, places: np.ndarray, out: np.ndarray, target: np.ndarray) -> None:
    """out[target] = column[places], all rows being bytes of one length."""
    chunks = [array_bytes(chunk) for chunk in column.chunks]
    starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
    numbers = np.searchsorted(starts, places, side="right") - 1
    inside = places - starts[numbers]
    for to, number, place in zip(target.tolist(), numbers.tolist(), inside.tolist(), strict=True):
        out[to] = chunks[number][place]


def _serialised(table: pa.Table, size: int) -> pa.LargeBinaryArray:
    """Each `size` rows of the table as an IPC stream of their own."""
    count = -(-table.num_rows // size)
    data = pa.allocate_buffer(table.nbytes + count * (4096 + 1024 * table.num_columns))  # room for the headers
    sink, ends = pa.FixedSizeBufferWriter(data), [0]
    for start in range(0, table.num_rows, size):
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(start, size))
        ends.append(sink.tell())
    return pa.Array.from_buffers(pa.large_binary(), count, [None, pa.py_buffer(np.array(ends, np.int64)), data])


class RestingExecutor(ExecutionCallback):
    """Lets an executor of Ray Data rest when there is nothing to wait for.

    Its loop waits for running tasks only. Once all rows are read, or as many as may be buffered, none runs, and it
    would turn without a pause until the training has consumed them: two thirds of a core per worker.
    """

    def __init__(self) -> None:
        self._last, self._moved, self._rest = time.perf_counter(), 0, SHORTEST_REST

    def on_execution_step(self, executor: Any) -> None:
        counts = [one.metrics for one in executor._topology]
        moved = sum(one.num_task_outputs_generated + one.num_outputs_taken for one in counts)
        if moved == self._moved and time.perf_counter() - self._last < BUSY_STEP:
            time.sleep(self._rest)
            self._rest = min(2 * self._rest, LONGEST_REST)
        else:
            self._rest = SHORTEST_REST
        self._last, self._moved = time.perf_counter(), moved


def worker_shard(plan: StreamPlan, *, rank: int, num_workers: int, first_step: int) -> ray.data.DataIterator:
    """What `micro_batches` reads: the rows of one worker from `first_step` on, in plan order."""
    micro = (plan.num_steps - first_step) * plan.per_step(num_workers)
    chunks = np.arange(-(-micro // chunk_size(plan)), dtype=np.int64)
    # Made here, because each of `ray.data.range`'s reading tasks would start a process for a few numbers.
    tasks = min(-(-len(chunks) // CHUNKS_PER_TASK), MAX_TASKS)
    blocks = [pa.table({"chunk": part}) for part in np.array_split(chunks, tasks)]
    dataset = ray.data.from_arrow(blocks)
    context = dataset.context
    context.execution_options.preserve_order = True
    # By default a quarter of the node's memory is filled with rows that are not wanted yet.
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=READY_BYTES)
    context.enable_progress_bars = False  # the worker logs plain lines of its own
    context.target_max_block_size = BLOCK_BYTES
    context.custom_execution_callback_classes = [RestingExecutor]
    dataset = dataset.map_batches(
        cast(Any, PlanReader),
        fn_constructor_args=(plan, rank, num_workers, first_step),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0.5,
        zero_copy_batch=True,
    )
    # A split into one: its executor runs in an actor. Beside the training loop it would take the interpreter's lock
    # every few milliseconds, which made steps three times as long on a small CPU model.
    return dataset.streaming_split(1)[0]


def micro_batches(shard: Any) -> Iterator[pa.Table]:
    """The shard's rows as tables of one micro-batch each; reading begins at once."""
    return Prefetcher(_micro_batches(shard), MICRO_BATCHES_AHEAD)


def _micro_batches(shard: Any) -> Iterator[pa.Table]:
    for block in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        for chunk in block.column("micro_batch").chunks:
            for part in _parts(chunk):
                yield pa.ipc.open_stream(part).read_all()


def _parts(chunk: pa.LargeBinaryArray) -> Iterator[pa.Buffer]:
    """Its values where they lie: an element of an Arrow array is a copy, half a millisecond for each two megabytes."""
    _, ends, data = chunk.buffers()
    places = np.frombuffer(ends, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
    for start, end in pairwise(places):
        yield data.slice(start, end - start)
