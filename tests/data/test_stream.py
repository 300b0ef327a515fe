"""Ray Data delivers exactly the planned rows, in the planned order, to each worker."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pyarrow as pa
import pytest
import ray
import ray.data
from ray.exceptions import RayActorError

from benchmarks.stream_registration import register_readers
from d2f_core.data import stream
from d2f_core.data.chunks import micro_batches_per_chunk
from d2f_core.data.manifest import Manifest, ManifestError, read_manifest, write_manifest, write_part
from d2f_core.data.plan_source import PlanSource
from d2f_core.data.ray_data import INIT_DEATHS
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.stream import micro_batches, worker_shard
from d2f_core.data.stream_plan import Source, StreamPlan
from d2f_core.train.restarts import causes, is_final
from infra.local.ray_head import LOGICAL_CPUS
from tests.ray_internals import data_coordinator
from tests.ray_processes import processes, wait_for

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("cluster")]
ROWS = 300
READER = "ray::BlockReader"
OTHER_JOB = """
import ray.data
ray.init(log_to_driver=False)
print(ray.data.range(8, override_num_blocks=4).map_batches(lambda batch: batch, num_cpus=1).sum("id"))
"""


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


@pytest.fixture(scope="module")
def long_plan(s3) -> StreamPlan:
    """Nine chunks for each of two workers."""
    uri = write_table("s3://d2f/test-stream/long", ROWS, "long")
    return plan_of({uri: ROWS}, batch=16, micro=4, steps=1100, window_rows=20, lanes=4)


def rows_of(batches: Iterator[pa.Table]) -> list[list[int]]:
    return [batch.column("row").to_pylist() for batch in batches]


def planned(plan: StreamPlan, rank: int, num_workers: int, first: int = 0) -> list[list[int]]:
    per_step = plan.per_step(num_workers)
    numbers = range(first * per_step, plan.num_steps * per_step)
    return [plan.micro_batch(number, rank, num_workers).rows.tolist() for number in numbers]


def test_each_worker_gets_its_plan_from_tables_of_two_sizes():
    names = ("wide", "tall")
    tables = {write_table(f"s3://d2f/test-stream/{name}", ROWS, name): ROWS for name in names}
    plan = plan_of(tables, batch=12, micro=3, steps=140, window_rows=20, lanes=4, holdout_rows=10)
    first, per_step = 5, plan.per_step(2)
    row_bytes = max(read_manifest(uri).row_bytes for uri in tables)
    per_chunk = micro_batches_per_chunk(plan, row_bytes)
    assert (140 - first) * per_step % per_chunk, "the last chunk must be shorter than the others"
    seen = []
    shards = [worker_shard(plan, rank=rank, num_workers=2, first_step=first) for rank in range(2)]
    for rank, stream_ in enumerate([micro_batches(shard) for shard in shards]):
        batches = list(stream_)
        assert len(batches) == (140 - first) * per_step
        for number, batch in enumerate(batches, first * per_step):
            wanted = plan.micro_batch(number, rank, 2)
            assert batch.column("caption").to_pylist() == [f"{names[wanted.source]} {row}" for row in wanted.rows]
            assert batch.column("row").to_pylist() == (wanted.rows + plan.first_rows[wanted.source]).tolist()
            assert batch.column("epoch").to_pylist() == wanted.epochs.tolist()
            assert batch.column("reason").null_count == 3
            seen += zip(batch.column("epoch").to_pylist(), batch.column("row").to_pylist(), strict=True)
    assert len(set(seen)) == len(seen) == (140 - first) * 12
    assert shards[1].stats() == f"{len(batches)} micro-batches were delivered by the last iteration"


def test_an_ordinary_execution_of_ray_data_reads_the_same_rows(long_plan):
    dataset = ray.data.read_datasource(PlanSource(long_plan, num_workers=2, first_step=1000))
    dataset.context.execution_options.preserve_order = True
    found = [pa.ipc.open_stream(row["micro_batch"]).read_all() for row in dataset.iter_rows()]
    assert rows_of(iter(found)) == planned(long_plan, 0, 2, 1000) + planned(long_plan, 1, 2, 1000)


def test_a_reader_that_is_killed_is_replaced_and_goes_on_with_the_next_row(long_plan, monkeypatch, caplog):
    monkeypatch.setattr(stream, "MOST_READY", 1)
    batches = micro_batches(worker_shard(long_plan, rank=1, num_workers=2, first_step=7))
    found = [next(batches) for _ in range(3)]
    (reader,) = processes(READER)
    reader.kill()
    assert rows_of(iter([*found, *batches])) == planned(long_plan, 1, 2, 7)
    assert "the reader of worker 1 is started anew: " in caplog.text
    wait_for("the end of its reader", lambda: not processes(READER), 30)


def test_readers_that_keep_dying_end_the_attempt(long_plan, monkeypatch):
    start, started = stream.start_reader, []

    def start_and_kill(*args, **options):
        started.append(start(*args, **options))
        ray.kill(started[-1])
        return started[-1]

    monkeypatch.setattr(stream, "start_reader", start_and_kill)
    with pytest.raises(RayActorError):
        next(micro_batches(worker_shard(long_plan, rank=0, num_workers=2, first_step=0)))
    assert len(started) == INIT_DEATHS


@ray.remote(num_cpus=0)
class Worker:
    def begin(self, plan: StreamPlan) -> tuple[int, list[int]]:
        self.batches = micro_batches(worker_shard(plan, rank=0, num_workers=2, first_step=0))
        return os.getpid(), next(self.batches).column("row").to_pylist()


def test_a_worker_that_is_killed_or_done_with_its_rows_leaves_no_reader(long_plan):
    worker, first = Worker.remote(), planned(long_plan, 0, 2)[0]
    batches = micro_batches(worker_shard(long_plan, rank=0, num_workers=2, first_step=0))
    pid, rows = ray.get(worker.begin.remote(long_plan))
    assert rows == next(batches).column("row").to_pylist() == first
    assert len(processes(READER)) == 2
    psutil.Process(pid).kill()
    wait_for("the end of the killed worker's reader", lambda: len(processes(READER)) == 1, 30)
    del batches
    wait_for("the end of the other reader", lambda: not processes(READER), 30)


def test_a_table_that_was_replaced_ends_the_training(bucket):
    uri = write_table(f"{bucket}/table", ROWS, "other")
    plan = plan_of({uri: ROWS}, batch=4, micro=4, steps=3)
    source = Source(uri=uri, order=plan.sources[0].order, digest="0" * 64)
    replaced = StreamPlan(
        sources=(source,), columns=plan.columns, global_batch_size=4, micro_batch_size=4, num_steps=3
    )  # fmt: skip
    with pytest.raises(ManifestError, match="it was replaced") as caught:
        next(micro_batches(worker_shard(replaced, rank=0, num_workers=1, first_step=0)))
    assert is_final(causes(caught.value)[0]), "a restart would end alike"


def cpus_of_another_execution() -> float:
    """What Ray Data's coordinator would leave to an execution that comes now."""
    coordinator, name = data_coordinator(), "test-stream"
    ray.get(coordinator.request_resources.remote(name, [], 60.0, request_remaining=["CPU"]))
    reserved = ray.get(coordinator.get_reserved_resources.remote(name))
    ray.get(coordinator.cancel_request.remote(name))
    return sum(node.get("CPU", 0) for node in reserved.values())


@ray.remote
class Placeholder:
    """Holds CPUs, so that others have no room there."""

    def ready(self) -> bool:
        return True


def holding(cpus: int):
    placeholder = Placeholder.options(num_cpus=cpus).remote()
    assert ray.get(placeholder.ready.remote(), timeout=60)
    return placeholder


def test_a_training_and_another_job_share_a_node_whose_cpus_are_taken(long_plan):
    """The training's workers hold all CPUs but one, and the other job holds that one when the rows are asked for; then
    the other job has to come to its end while the training still wants rows."""
    before = cpus_of_another_execution()
    workers, other = holding(LOGICAL_CPUS - 1), holding(1)
    shards = [worker_shard(long_plan, rank=rank, num_workers=2, first_step=0) for rank in range(2)]
    streams = [micro_batches(shard) for shard in shards]
    found = [[next(batches)] for batches in streams]
    assert cpus_of_another_execution() >= before, "an execution each took a share of every node"
    ray.kill(other)
    job = subprocess.run([sys.executable, "-c", OTHER_JOB], capture_output=True, text=True, timeout=120)
    assert job.returncode == 0 and job.stdout.split()[-1] == "28", job.stderr
    ray.kill(workers)
    for rank, batches in enumerate(streams):
        assert rows_of(iter([*found[rank], *batches])) == planned(long_plan, rank, 2)


def test_the_readers_of_512_simulated_workers_are_registered_at_once():
    """Threads of this process; their actors are never placed (see `benchmarks.stream_registration`). Registered with
    Ray Data's coordinator, an execution each, 256 took 23 s."""
    before = cpus_of_another_execution()
    assert register_readers(512) < 10
    assert cpus_of_another_execution() >= before


def test_no_more_is_read_than_may_be_ready(long_plan, monkeypatch):
    """A block of 1,024 rows is some hundred kilobytes."""
    monkeypatch.setattr(stream, "READY_BYTES", 2**20)
    reader = stream.start_reader(PlanSource(long_plan, num_workers=2), 0)
    about, _ = next(blocks := stream._blocks(reader))
    time.sleep(3)
    _, block = ray.get(reader.next_block.options(num_returns=2).remote())
    number = next(iter(block.column("micro_batch")))
    row = pa.ipc.open_stream(number.as_buffer()).read_all().column("row").to_pylist()
    asked = planned(long_plan, 0, 2).index(row) // about.num_rows - 1
    assert 1 <= asked <= 2**20 // about.size_bytes
    blocks.close()


def test_a_reader_that_is_ahead_of_its_consumer_costs_no_processor_time():
    """More rows than may be ready wait for a slow training: their reader must rest meanwhile."""
    uri = "s3://d2f/test-stream/large-rows"
    part = write_part(uri, "part-0.parquet", pa.table({"image": [b"0" * 250_000] * 150}))
    write_manifest(uri, Manifest(kind="images", files=(part,)))
    plan = plan_of({uri: 150}, batch=4, micro=4, steps=500, columns=("image",))
    batches = micro_batches(worker_shard(plan, rank=0, num_workers=1, first_step=0))
    next(batches)
    time.sleep(4)
    (reader,) = processes(READER)
    before, here = reader.cpu_times(), time.process_time()
    time.sleep(4)
    after = reader.cpu_times()
    used = after.user + after.system - before.user - before.system + time.process_time() - here
    assert used < 0.8, f"{used} of 4 seconds"
    assert sum(1 for _ in batches) == 499
