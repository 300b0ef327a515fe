"""A table of a thousand million rows is planned from its files alone: in little time, and in little memory."""

import hashlib
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_core.data.manifest import Manifest, TableFile, read_manifest, run_lengths, write_manifest, write_part
from d2f_core.data.plan_reader import PlanReader
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.stream_plan import Source, StreamPlan
from d2f_core.data.table_reader import RowGroup, TableReader

ROWS, FILE_ROWS, WORKERS = 1_000_000_000, 50_000, 1024
LAST, HALF_AN_EPOCH = WORKERS - 1, 30_517


def plan_of(uri: str) -> StreamPlan:
    order = SampleOrder(num_rows=ROWS, batch=16 * WORKERS, lanes=WORKERS)
    return StreamPlan(
        sources=(Source(uri=uri, order=order),),
        columns=("number",),
        global_batch_size=16 * WORKERS,
        micro_batch_size=16,
        num_steps=10**6,
    )


def file_name(number: int) -> str:
    return f"part-{number:06d}-00000.parquet"


def write_file(uri: str, number: int) -> TableFile:
    return write_part(
        uri, file_name(number), pa.table({"number": np.arange(number * FILE_ROWS, (number + 1) * FILE_ROWS)})
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """20,000 files by its manifest. The first is there, and those that the last worker needs first in mid-epoch."""
    place = tmp_path_factory.mktemp("huge")
    groups = run_lengths([64] * (FILE_ROWS // 64) + [FILE_ROWS % 64])
    files = [
        TableFile(path=file_name(number), rows=FILE_ROWS, size=2**28, sha256=hashlib.sha256(b"%d" % number).hexdigest(),
                  row_groups=groups)
        for number in range(ROWS // FILE_ROWS)
    ]  # fmt: skip
    plan = plan_of(str(place))
    rows = np.concatenate([plan.micro_batch(HALF_AN_EPOCH + n, LAST, WORKERS).rows for n in range(64)])
    bounds = [plan.sources[0].order.window_bounds(window) for window in plan.sources[0].order.window_of(rows).tolist()]
    for number in {0, *(row // FILE_ROWS for first, end in bounds for row in (first, end - 1))}:
        files[number] = write_file(str(place), number)
    write_manifest(str(place), Manifest(kind="latents", files=tuple(files)))
    return place


def find_first_rows(uri: str, step: int) -> list[RowGroup]:
    """What a worker does before it reads: manifest, reader, plan of the step, and the row groups of its windows."""
    plan, reader = plan_of(uri), TableReader(uri, read_manifest(uri), ("number",))
    order, found = plan.sources[0].order, []
    for window in np.unique(order.window_of(plan.micro_batch(step, LAST, WORKERS).rows)).tolist():
        first, end = order.window_bounds(window)
        found += reader.row_groups(*reader.groups_of(np.array([first, end - 1])).tolist())
    return found


def test_a_worker_plans_a_billion_rows_from_the_files_alone(table):
    assert (table / "manifest.json").stat().st_size < 5e6
    began = time.process_time()
    groups = find_first_rows(str(table), HALF_AN_EPOCH)
    assert time.process_time() - began < 5, "0.5 s on a core shared with other work"
    assert 8 <= len(groups) <= 18, "one window of 512 rows, or two"
    for group in groups:
        assert group.first == group.file * FILE_ROWS + group.number * 64 and group.end - group.first in (64, 16)


def test_it_takes_memory_by_the_file_not_by_the_row(table):
    tracemalloc.start()
    try:
        reader = TableReader(str(table), read_manifest(str(table)), ("number",))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reader.groups_of(np.array([ROWS - 1])) == 20_000 * 782 - 1
    assert kept < 30e6 and peak < 60e6, "one tuple per row group took 2.5 GB"


def test_the_first_rows_of_a_worker_in_mid_epoch_are_those_of_the_plan(table):
    plan = plan_of(str(table))
    chunk = PlanReader(plan, LAST, WORKERS, HALF_AN_EPOCH).read(0)
    for number, part in enumerate(chunk.column("micro_batch")):
        batch = pa.ipc.open_stream(part.as_buffer()).read_all()
        wanted = plan.micro_batch(HALF_AN_EPOCH + number, LAST, WORKERS).rows.tolist()
        assert batch.column("number").to_pylist() == batch.column("row").to_pylist() == wanted
        assert batch.column("reason").null_count == 16


@settings(deadline=None, derandomize=True)
@given(tables=st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=6))
def test_rows_and_row_groups_are_found_however_the_files_are_cut(tables):
    """Also empty files, empty row groups, and row groups of all sizes."""
    files = tuple(
        TableFile(path=str(number), rows=sum(groups), size=0, sha256="", row_groups=run_lengths(groups))
        for number, groups in enumerate(tables)
    )
    reader = TableReader("/nowhere", Manifest(kind="images", files=files), ())
    expected, end = [], 0
    for file, groups in enumerate(tables):
        for number, rows in enumerate(groups):
            expected.append(RowGroup(file, number, end, end + rows))
            end += rows
    assert reader.row_groups(0, len(expected) - 1) == expected
    for row, found in enumerate(reader.groups_of(np.arange(end)).tolist()):
        assert expected[found].first <= row < expected[found].end
