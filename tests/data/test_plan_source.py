"""A plan as a source of Ray Data's: one read task per worker, whose blocks hold the plan's rows in order."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from d2f_core.data import plan_source
from d2f_core.data.manifest import Manifest, write_manifest, write_part
from d2f_core.data.plan_source import BlockReader, PlanSource
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.stream_plan import Source, StreamPlan

ROWS, BATCH, MICRO, STEPS = 3000, 1024, 2, 6


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> StreamPlan:
    place = str(tmp_path_factory.mktemp("table"))
    part = write_part(place, "part-0.parquet", pa.table({"number": list(range(ROWS))}), row_group_rows=64)
    write_manifest(place, Manifest(kind="numbers", files=(part,)))
    order = SampleOrder(num_rows=ROWS, holdout_rows=100, batch=BATCH, seed=3, window_rows=50, lanes=16)
    return StreamPlan(
        sources=(Source(uri=place, order=order),), columns=("number",), global_batch_size=BATCH,
        micro_batch_size=MICRO, num_steps=STEPS, buffer_bytes=2**20,
    )  # fmt: skip


def rows_of(block: pa.Table) -> Iterator[list[int]]:
    for part in block.column("micro_batch"):
        table = pa.ipc.open_stream(part.as_buffer()).read_all()
        assert table.column("number").to_pylist() == table.column("row").to_pylist()
        yield table.column("row").to_pylist()


def planned(plan: StreamPlan, rank: int, num_workers: int, first: int = 0, end: int = STEPS) -> list[list[int]]:
    per_step = plan.per_step(num_workers)
    return [plan.micro_batch(n, rank, num_workers).rows.tolist() for n in range(first * per_step, end * per_step)]


@pytest.mark.parametrize("num_workers", [1, 2, 8])
def test_each_task_yields_its_workers_rows_and_together_they_are_the_plan(plan, num_workers):
    tasks = PlanSource(plan, num_workers=num_workers, first_step=2).get_read_tasks(1)
    found = [[rows for block in task() for rows in rows_of(block)] for task in tasks]
    assert [task.metadata.num_rows for task in tasks] == [len(one) for one in found]
    assert found == [planned(plan, rank, num_workers, 2) for rank in range(num_workers)]
    per_step = plan.per_step(num_workers)
    together = [one[step * per_step : (step + 1) * per_step] for step in range(STEPS - 2) for one in found]
    assert [rows for share in together for rows in share] == planned(plan, 0, 1, 2)


def test_the_shares_of_512_workers_make_up_each_global_batch(plan):
    """Simulated: their tasks run one after another in this process, over the plan's last step."""
    source = PlanSource(plan, num_workers=512, first_step=STEPS - 1)
    found = [rows for rank in range(512) for block in source.read_task(rank)() for rows in rows_of(block)]
    assert found == planned(plan, 0, 1, STEPS - 1)


def test_a_task_goes_on_after_any_micro_batch_in_blocks_of_any_size(plan, monkeypatch):
    whole = planned(plan, 1, 2, 3)
    for skip, block_bytes in ((0, 1), (1, 2**14), (777, 2**25), (len(whole), 2**25)):
        monkeypatch.setattr(plan_source, "BLOCK_BYTES", block_bytes)
        blocks = list(PlanSource(plan, num_workers=2, first_step=3).read_task(1, skip=skip)())
        assert all(block.num_rows == 1 or block.nbytes <= block_bytes for block in blocks)
        assert [rows for block in blocks for rows in rows_of(block)] == whole[skip:]


def test_a_reader_says_what_each_block_holds_and_when_there_are_no_more(plan):
    reader, found = BlockReader(PlanSource(plan, num_workers=4).read_task(3)), []
    while (answer := reader.next_block()) != (None, None):
        about, block = answer
        assert (about.num_rows, about.size_bytes) == (block.num_rows, block.nbytes)
        found += rows_of(block)
    assert found == planned(plan, 3, 4) and reader.next_block() == (None, None)


def test_a_reader_that_cannot_read_says_so_when_it_is_asked(plan, tmp_path: Path):
    missing = StreamPlan(
        sources=(Source(uri=str(tmp_path / "none"), order=plan.sources[0].order),), columns=("number",),
        global_batch_size=BATCH, micro_batch_size=MICRO, num_steps=1,
    )  # fmt: skip
    reader = BlockReader(PlanSource(missing, num_workers=1).read_task(0))
    with pytest.raises(ValueError, match="none"):
        reader.next_block()
