"""Ray Data delivers exactly the planned rows, in the planned order, to each worker."""

import time

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray

from d2f_core.data.manifest import Manifest, read_manifest, write_manifest, write_part
from d2f_core.data.order import SampleOrder
from d2f_core.data.stream import MICRO_BATCHES_PER_CHUNK, PlannedData, RowReader, StreamPlan, micro_batches

pytestmark = pytest.mark.timeout(240)
ROWS = 150


@pytest.fixture(scope="module")
def table(s3) -> str:
    uri = "s3://d2f/test-stream/table"
    rows = pa.table({"caption": [f"row {i}" for i in range(ROWS)], "other": list(range(ROWS))})
    files = tuple(write_part(uri, f"part-{i}.parquet", rows.slice(75 * i, 75)) for i in range(2))
    write_manifest(uri, Manifest(kind="images", files=files))
    return uri


def test_any_rows_in_any_order(table):
    reader = RowReader(table, read_manifest(table), ["caption"])
    wanted = np.array([149, 0, 74, 75, 63, 64, 0])
    assert reader.read(wanted).column("caption").to_pylist() == [f"row {i}" for i in wanted]
    assert reader.read(wanted).column_names == ["caption"]


def test_each_worker_gets_its_plan(stack, table):
    ray.init(ignore_reinit_error=True)
    order = SampleOrder(num_rows=ROWS, holdout_rows=10, seed=3)
    plan = StreamPlan(
        uri=table,
        columns=("caption",),
        order=order,
        global_batch_size=12,
        micro_batch_size=3,
        first_step=5,
        num_steps=30,
    )
    assert 50 > MICRO_BATCHES_PER_CHUNK, "the last chunk must be shorter than the others"
    shards = PlannedData(plan).configure({}, 2, None, None)
    seen = []
    for rank, shard in enumerate(shards):
        batches = list(micro_batches(shard["train"], 3))
        assert len(batches) == plan.num_micro_batches(2) == 50
        for index, batch in enumerate(batches):
            epochs, rows = order.at(plan.positions(index, rank, 2))
            assert batch.column("caption").to_pylist() == [f"row {row}" for row in rows]
            assert batch.column("row").to_pylist() == rows.tolist()
            assert batch.column("epoch").to_pylist() == epochs.tolist()
            seen += list(zip(epochs.tolist(), rows.tolist(), strict=True))
    assert sorted(seen) == sorted(zip(*(values.tolist() for values in order.at(np.arange(60, 360))), strict=True))


def test_a_reader_that_is_ahead_of_its_consumer_costs_no_processor_time(stack):
    """More rows than may be buffered wait for a slow training: the executor's actor must rest meanwhile."""
    ray.init(ignore_reinit_error=True)
    uri = "s3://d2f/test-stream/large-rows"
    part = write_part(uri, "part-0.parquet", pa.table({"image": [b"0" * 250_000] * ROWS}))
    write_manifest(uri, Manifest(kind="images", files=(part,)))
    plan = StreamPlan(
        uri=uri,
        columns=("image",),
        order=SampleOrder(num_rows=ROWS),
        global_batch_size=4,
        micro_batch_size=4,
        first_step=0,
        num_steps=1500,
    )
    (shard,) = PlannedData(plan).configure({}, 1, None, None)
    batches = micro_batches(shard["train"], 4)
    next(batches)
    time.sleep(4)
    *_, executor = (process for process in psutil.process_iter() if process.name().startswith("ray::SplitCoord"))
    before = executor.cpu_times()
    time.sleep(4)
    after = executor.cpu_times()
    used = after.user + after.system - before.user - before.system
    assert used < 1.6, f"{used} of 4 seconds"
    assert sum(1 for _ in batches) == 1499
