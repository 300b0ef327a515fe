"""Ray Data delivers exactly the planned rows, in the planned order, to each worker."""

import time

import psutil
import pyarrow as pa
import pytest
import ray

from d2f_core.data.manifest import Manifest, write_manifest, write_part
from d2f_core.data.plan_reader import chunk_size
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.stream import micro_batches, worker_shard
from d2f_core.data.stream_plan import Source, StreamPlan

pytestmark = pytest.mark.timeout(240)
ROWS = 300


def write_table(uri: str, rows: int, name: str) -> str:
    table = pa.table({"caption": [f"{name} {i}" for i in range(rows)], "other": list(range(rows))})
    half = rows // 2
    files = tuple(write_part(uri, f"part-{i}.parquet", table.slice(half * i, half)) for i in range(2))
    write_manifest(uri, Manifest(kind="images", files=files))
    return uri


def plan_of(uris: dict[str, int], *, batch: int, micro: int, steps: int, columns=("caption",), **order) -> StreamPlan:
    sources = tuple(
        Source(uri=uri, order=SampleOrder(num_rows=rows, batch=batch, seed=3, **order)) for uri, rows in uris.items()
    )
    return StreamPlan(
        sources=sources, columns=columns, global_batch_size=batch, micro_batch_size=micro, num_steps=steps, seed=3
    )  # fmt: skip


def test_each_worker_gets_its_plan_from_tables_of_two_sizes(stack):
    ray.init(ignore_reinit_error=True)
    names = ("wide", "tall")
    tables = {write_table(f"s3://d2f/test-stream/{name}", ROWS, name): ROWS for name in names}
    plan = plan_of(tables, batch=12, micro=3, steps=140, window_rows=20, lanes=4, holdout_rows=10)
    first, per_step = 5, plan.per_step(2)
    assert (140 - first) * per_step % chunk_size(plan), "the last chunk must be shorter than the others"
    seen = []
    for rank in range(2):
        batches = list(micro_batches(worker_shard(plan, rank=rank, num_workers=2, first_step=first)))
        assert len(batches) == (140 - first) * per_step
        for number, batch in enumerate(batches, first * per_step):
            wanted = plan.micro_batch(number, rank, 2)
            assert batch.column("caption").to_pylist() == [f"{names[wanted.source]} {row}" for row in wanted.rows]
            assert batch.column("row").to_pylist() == (wanted.rows + plan.first_rows[wanted.source]).tolist()
            assert batch.column("epoch").to_pylist() == wanted.epochs.tolist()
            assert batch.column("reason").null_count == 3
            seen += zip(batch.column("epoch").to_pylist(), batch.column("row").to_pylist(), strict=True)
    assert len(set(seen)) == len(seen) == (140 - first) * 12


def test_a_reader_that_is_ahead_of_its_consumer_costs_no_processor_time(stack):
    """More rows than may be buffered wait for a slow training: the executor's actor must rest meanwhile."""
    ray.init(ignore_reinit_error=True)
    uri = "s3://d2f/test-stream/large-rows"
    part = write_part(uri, "part-0.parquet", pa.table({"image": [b"0" * 250_000] * 150}))
    write_manifest(uri, Manifest(kind="images", files=(part,)))
    plan = plan_of({uri: 150}, batch=4, micro=4, steps=1500, columns=("image",))
    batches = micro_batches(worker_shard(plan, rank=0, num_workers=1, first_step=0))
    next(batches)
    time.sleep(4)
    *_, executor = (process for process in psutil.process_iter() if process.name().startswith("ray::SplitCoord"))
    before = executor.cpu_times()
    time.sleep(4)
    after = executor.cpu_times()
    used = after.user + after.system - before.user - before.system
    assert used < 1.6, f"{used} of 4 seconds"
    assert sum(1 for _ in batches) == 1499
