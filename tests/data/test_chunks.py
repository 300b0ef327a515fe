"""A reader's memory goes by bytes: small rows are read by whole windows, large ones stay within the buffer."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_core.data.arrays import arrays_to_table
from d2f_core.data.chunks import CHUNK_COPIES, FETCH_SHARE, READ_AHEAD_CHUNKS, ChunkPlanner, micro_batches_per_chunk
from d2f_core.data.manifest import Manifest, TableFile, read_manifest, rows_per_group, write_manifest, write_part
from d2f_core.data.plan_reader import READING_THREADS, ByteLimit, PlanReader
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.schema import array_field
from d2f_core.data.stream_plan import BUFFER_BYTES, Source, StreamPlan
from d2f_core.data.table_reader import TableReader
from tests.data.measured import measure

MIB = 2**20


def plan_of(uri: str, rows: int, *, batch: int = 64, micro: int = 8, steps: int = 1000, **fields) -> StreamPlan:
    order = {name: fields.pop(name) for name in ("lanes", "window_rows", "seed") if name in fields}
    return StreamPlan(
        sources=(Source(uri=uri, order=SampleOrder(num_rows=rows, batch=batch, **order)),), columns=("array",),
        global_batch_size=batch, micro_batch_size=micro, num_steps=steps, **fields,
    )  # fmt: skip


def reader_of(rows: int, row_bytes: int, group_rows: int = 64) -> TableReader:
    """Of a table that its manifest alone knows."""
    full, rest = divmod(rows, group_rows)
    groups = ((group_rows, full), (rest, 1)) if rest else ((group_rows, full),)
    file = TableFile(path="0", rows=rows, size=rows * row_bytes, sha256="", row_groups=groups)
    return TableReader("/nowhere", Manifest(kind="arrays", files=(file,)), ())


def planner_of(plan: StreamPlan, reader: TableReader) -> ChunkPlanner:
    return ChunkPlanner(plan, 0, 1, 0, [reader])


@pytest.mark.parametrize("row_bytes", [1, 3_000, 33_000, 66_000])
def test_small_rows_are_read_as_ever_by_a_thousand_and_by_whole_windows(row_bytes):
    plan = plan_of("", 100_000)
    assert micro_batches_per_chunk(plan, row_bytes) == 128
    ahead = planner_of(plan, reader_of(100_000, row_bytes)).ahead(5)
    assert len(ahead) == 1 + READ_AHEAD_CHUNKS
    windows = {plan.sources[0].order.window_bounds(window) for window in range(plan.sources[0].order.num_windows)}
    assert {(piece.first, piece.end) for chunk in ahead for piece in chunk.pieces} <= windows
    assert all(piece.kept is None for chunk in ahead for piece in chunk.pieces)
    in_flight = max(piece.in_flight for chunk in ahead for piece in chunk.pieces)
    assert READING_THREADS * in_flight <= BUFFER_BYTES // FETCH_SHARE, "no thread waits for another"


@pytest.mark.parametrize(("row_bytes", "micro_batches"), [(2**17, 128), (2**18, 64), (2 * 10**6, 8), (10**9, 1)])
def test_a_chunk_is_as_long_as_its_bytes_allow_and_at_least_one_micro_batch(row_bytes, micro_batches):
    assert micro_batches_per_chunk(plan_of("", 1000), row_bytes) == micro_batches


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    row_bytes=st.integers(1, 8 * 10**6), group_rows=st.sampled_from([1, 4, 64]), micro=st.sampled_from([1, 4, 16]),
    lanes=st.sampled_from([1, 4, 16]), window_rows=st.sampled_from([8, 100, 512]),
    buffer=st.sampled_from([2**26, 2**28, 2**31]), start=st.integers(0, 30),
)  # fmt: skip
def test_what_is_kept_fits_the_buffer_and_is_what_the_chunks_need(
    row_bytes, group_rows, micro, lanes, window_rows, buffer, start
):
    rows = 5_000
    plan = plan_of("", rows, micro=micro, lanes=lanes, window_rows=window_rows, buffer_bytes=buffer)
    planner = planner_of(plan, reader_of(rows, row_bytes, group_rows))
    per_chunk = micro_batches_per_chunk(plan, row_bytes)
    before: list = []
    for chunk in range(start, start + 3):
        ahead = planner.ahead(chunk)
        chunk_bytes = per_chunk * micro * row_bytes
        kept = {piece: piece.size for one in ahead for piece in one.pieces}
        held = sum(kept.values()) + CHUNK_COPIES * chunk_bytes + buffer // FETCH_SHARE
        assert held <= buffer or (len(ahead) == 1 and sum(kept.values()) <= chunk_bytes)
        assert [id(one) for one in ahead[: len(before)]] == [id(one) for one in before], "what is fetched is used"
        before = ahead[1:]
        wanted = [plan.micro_batch(chunk * per_chunk + part, 0, 1) for part in range(per_chunk)]
        (run,) = ahead[0].runs
        assert run.rows.tolist() == np.concatenate([one.rows for one in wanted]).tolist()
        assert sorted(np.concatenate([places for _, places in run.needs]).tolist()) == list(range(len(run.rows)))
        for piece, places in run.needs:
            needed = set(run.rows[places].tolist())
            assert all(piece.first <= row < piece.end for row in needed)
            assert piece.kept is None or (set(piece.kept) == needed and piece.size == len(needed) * row_bytes)


def test_as_many_threads_fetch_as_their_bytes_allow_and_one_always():
    limit, running, seen, lock = ByteLimit(10), [], [], threading.Lock()

    def fetch(size: int) -> None:
        with limit.taking(size):
            with lock:
                running.append(size)
                seen.append(list(running))
            time.sleep(0.01)
            with lock:
                running.remove(size)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fetch, [4, 4, 4, 4, 30, 1, 1, 10, 4]))
    assert all(sum(sizes) <= 10 or len(sizes) == 1 for sizes in seen)
    assert max(map(len, seen)) > 1 and [30] in seen


def test_the_largest_rows_of_a_table_count():
    files = tuple(
        TableFile(path=str(size), rows=rows, size=size, sha256="", row_groups=((rows, 1),))
        for rows, size in ((10, 1000), (10, 50_001), (0, 600))
    )
    assert Manifest(kind="arrays", files=files).row_bytes == 5001
    assert Manifest(kind="arrays", files=()).row_bytes == 0


LARGE_ROWS, LARGE, BUFFER = 288, (1000, 1000), 256 * MIB
"""Rows of 2 MB, 576 MB in all, through a buffer of 256 MiB."""


@pytest.fixture(scope="module")
def large_table(tmp_path_factory) -> Path:
    place, files = tmp_path_factory.mktemp("large"), []
    schema = pa.schema([pa.field("number", pa.int64()), array_field("array", "float16", LARGE)])
    for first in range(0, LARGE_ROWS, 48):
        numbers = np.arange(first, first + 48)
        arrays = np.broadcast_to(numbers[:, None, None].astype("f2"), (48, *LARGE))
        table = arrays_to_table({"number": numbers, "array": arrays}, schema)
        files.append(write_part(str(place), f"{first}.parquet", table, row_group_rows=rows_per_group(2 * 10**6)))
    write_manifest(str(place), Manifest(kind="arrays", files=tuple(files)))
    return place


def large_plan(uri: str, window_rows: int) -> StreamPlan:
    plan = plan_of(
        uri, LARGE_ROWS, batch=16, micro=4, steps=LARGE_ROWS // 16, lanes=4, window_rows=window_rows,
        buffer_bytes=BUFFER,
    )  # fmt: skip
    return dataclasses.replace(plan, columns=("number", "array"))


def stream_large(uri: str, window_rows: int) -> tuple[int, int, list[str]]:
    """The most bytes that the reader held between two chunks; that were allocated at any time, what is in flight and
    what Arrow copies included; and what was wrong with the rows."""
    plan, wrong = large_plan(uri, window_rows), []
    reader, most, read = PlanReader(plan, 0, 1, 0), 0, 0
    for table in reader:
        fetched = [one.result().table for one in reader._pieces.values()]
        scratch = sum(buffer.nbytes for buffer in reader._gatherer._buffers.values())
        most = max(most, sum(one.nbytes for one in fetched) + scratch + table.nbytes)
        for number, part in enumerate(table.column("micro_batch"), read):
            rows, wanted = pa.ipc.open_stream(part.as_buffer()).read_all(), plan.micro_batch(number, 0, 1).rows
            values = rows.column("array").combine_chunks()
            firsts = [np.frombuffer(value.as_py()[:2], "f2")[0] for value in values]
            if not rows.column("number").to_pylist() == rows.column("row").to_pylist() == firsts == wanted.tolist():
                wrong.append(f"micro-batch {number}")
        read += table.num_rows
    assert read == plan.num_steps * plan.per_step(1)
    return most, pa.default_memory_pool().max_memory() + scratch, wrong


@pytest.mark.parametrize(("window_rows", "whole"), [(8, True), (512, False)])
def test_two_megabyte_rows_stream_in_order_within_the_buffer(large_table, window_rows, whole):
    """By whole windows where they fit, by row groups where not: 288 rows x 2 MB would be the one window."""
    plan = large_plan(str(large_table), window_rows)
    reader = TableReader(plan.sources[0].uri, read_manifest(plan.sources[0].uri), plan.columns)
    assert {piece.kept is None for piece in planner_of(plan, reader).ahead(0)[0].pieces} == {whole}
    cost = measure(stream_large, str(large_table), window_rows)
    held, allocated, wrong = cost.answer
    assert not wrong
    assert 16 * 2 * 10**6 < held < allocated < BUFFER
    assert cost.memory < 1.5 * BUFFER, "with what the allocator keeps, and the modules"
