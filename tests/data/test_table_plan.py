"""Buckets by a column: each micro-batch of one bucket, each row once per epoch of its bucket, on any workers."""

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_core.data.manifest import (
    Manifest,
    ManifestError,
    TableFile,
    bucket_runs,
    read_manifest,
    write_manifest,
    write_part,
)
from d2f_core.data.plan_reader import PlanReader
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.stream_plan import MicroBatch, Source, StreamPlan
from d2f_core.data.table_plan import BucketError, OrderConfig, RowBuckets, plan_tables, row_buckets

GLOBAL, MICRO = 16, 4
checked = settings(deadline=None, derandomize=True)
sizes = st.lists(st.integers(2, 30), min_size=1, max_size=12)


def table_of(rows: list[int], name: str = "b") -> Manifest:
    """A table with buckets of so many rows, known by its manifest alone."""
    total = sum(rows)
    file = TableFile(path="0", rows=total, size=100 * total, sha256="", row_groups=((total, 1),))
    return Manifest(kind="pairs", files=(file,), buckets=tuple((f"{name}{n}", count) for n, count in enumerate(rows)))


def plan_of(*tables: list[int], seed: int = 0, holdout: int = 1, window_rows: int = 8, **fields) -> StreamPlan:
    order = OrderConfig(
        seed=seed, global_batch_size=GLOBAL, micro_batch_size=MICRO, lanes=2, window_rows=window_rows,
        bucket_column="category", **fields,
    )  # fmt: skip
    manifests = [table_of(rows) for rows in tables]
    uris = [f"/{number}" for number in range(len(tables))]
    return plan_tables(uris, manifests, ("text",), order, holdout_rows=holdout, num_steps=1000)


def micro_batches(plan: StreamPlan, step: int, num_workers: int) -> list[MicroBatch]:
    """A step's micro-batches, in their order over all workers."""
    per_step = plan.per_step(num_workers)
    numbers = [(rank, step * per_step + part) for rank in range(num_workers) for part in range(per_step)]
    return [plan.micro_batch(number, rank, num_workers) for rank, number in numbers]


def bounds_of(plan: StreamPlan, source: int) -> range:
    one = plan.sources[source]
    return range(one.first_row, one.first_row + one.order.num_rows)


@checked
@given(rows=sizes, seed=st.integers(0, 4), holdout=st.integers(0, 1), steps=st.integers(1, 40))
def test_every_row_comes_exactly_once_per_epoch_of_its_bucket(rows, seed, holdout, steps):
    plan, seen = plan_of(rows, seed=seed, holdout=holdout), defaultdict(Counter)
    for step in range(steps):
        for one in micro_batches(plan, step, 1):
            seen[one.source].update(zip(one.epochs.tolist(), one.rows.tolist(), strict=True))
    for source, counts in seen.items():
        held = set(plan.sources[source].holdout().tolist())
        trained = set(bounds_of(plan, source)) - held
        assert len(held) == holdout and set(counts.values()) == {1}
        last = max(epoch for epoch, _ in counts)
        for epoch in range(last):
            assert {row for of, row in counts if of == epoch} == trained, "an epoch is whole before the next one ends"
        assert {row for of, row in counts if of == last} <= trained


@checked
@given(rows=sizes, seed=st.integers(0, 4), step=st.integers(0, 50))
def test_any_number_of_workers_computes_the_same_micro_batches(rows, seed, step):
    plan = plan_of(rows, rows[::-1], seed=seed)
    found = [micro_batches(plan, step, workers) for workers in (1, 2, 4)]
    told = [[(one.source, one.epochs.tolist(), one.rows.tolist()) for one in parts] for parts in found]
    assert told[0] == told[1] == told[2] and len(told[0]) == GLOBAL // MICRO


@checked
@given(rows=sizes, seed=st.integers(0, 4), step=st.integers(0, 50))
def test_a_micro_batch_holds_rows_of_one_bucket(rows, seed, step):
    plan = plan_of(rows, seed=seed)
    for one in micro_batches(plan, step, 2):
        assert set(one.rows.tolist()) <= set(bounds_of(plan, one.source)) and len(one.rows) == MICRO


@checked
@given(rows=sizes, seed=st.integers(0, 4))
def test_over_a_cycle_each_bucket_gives_as_many_micro_batches_as_it_has(rows, seed):
    plan = plan_of(rows, seed=seed, holdout=0)
    batches = [-(-count // MICRO) for count in rows]
    for cycle in range(2):
        numbers = range(cycle * sum(batches), (cycle + 1) * sum(batches))
        taken = Counter(plan.micro_batch(number, 0, 1).source for number in numbers)
        assert [taken[source] for source in range(len(rows))] == batches


def test_each_seed_epoch_and_bucket_has_an_order_of_its_own():
    drawn = []
    for seed in (0, 1):
        plan = plan_of([40, 40], seed=seed, holdout=0, window_rows=64)
        for source in plan.sources:
            epochs = source.order.at(np.arange(80))[1]
            drawn += [tuple(epochs[:40].tolist()), tuple(epochs[40:].tolist())]
    assert len(set(drawn)) == 8


def test_row_numbers_are_unique_over_all_tables_and_lead_back_to_their_table():
    plan = plan_of([5, 7], [3, 4, 2])
    assert plan.tables == ("/0", "/1") and plan.table_of == (0, 0, 1, 1, 1)
    assert plan.first_rows == (0, 0, 12, 12, 12)
    assert [source.first_row for source in plan.sources] == [0, 5, 0, 3, 7]
    assert plan.num_samples == 21 - 5


def test_held_out_rows_are_as_many_of_each_bucket():
    plan = plan_of([9, 6], holdout=3)
    assert [source.holdout().tolist() for source in plan.sources] == [[0, 3, 6], [9, 11, 13]]


@pytest.mark.parametrize(
    ("manifest", "holdout", "message"),
    [
        (table_of([9, 2, 1]), 2, r"holdout_rows=2 .* 2 of 3 buckets of '/t' .* 'b2' has 1. Lower holdout_rows to 0"),
        (Manifest(kind="pairs", files=()), 1, r"bucket_column='category', and the manifest of '/t' has no buckets"),
    ],
)
def test_a_table_that_cannot_be_bucketed_is_refused(manifest, holdout, message):
    order = OrderConfig(global_batch_size=4, micro_batch_size=2, bucket_column="category")
    with pytest.raises(BucketError, match=message):
        plan_tables(["/t"], [manifest], (), order, holdout_rows=holdout, num_steps=1)


def test_sources_that_are_no_partition_of_their_tables_are_refused():
    order = SampleOrder(num_rows=4, batch=2)
    fields = {"columns": (), "global_batch_size": 4, "micro_batch_size": 2, "num_steps": 1}
    for uri, first_row in (("/a", 5), ("/b", 4)):
        parts = (Source(uri="/a", order=order), Source(uri=uri, order=order, first_row=first_row))
        with pytest.raises(ValueError, match=rf"source of '{uri}' from row {first_row} on does not follow"):
            StreamPlan(sources=parts, **fields)
    with pytest.raises(ValueError, match=r"buffer_bytes=0 must be at least 1\. Use 2147483648, 2 GiB"):
        StreamPlan(sources=(Source(uri="/a", order=order),), buffer_bytes=0, **fields)
    with pytest.raises(ValueError, match="batch=2 of an order is not micro_batch_size=1"):
        StreamPlan(sources=(Source(uri="/a", order=order),), one_source_per="micro_batch",
                   **fields | {"micro_batch_size": 1})  # fmt: skip
    with pytest.raises(ValueError, match="global_batch_size=4 is not a multiple of micro_batch_size=3"):
        StreamPlan(sources=(Source(uri="/a", order=order),), one_source_per="micro_batch",
                   **fields | {"micro_batch_size": 3})  # fmt: skip


def test_an_identity_holds_what_decides_the_order_and_the_micro_batch_size_where_it_does():
    order = {"seed": 3, "global_batch_size": 64, "lanes": 8, "window_rows": 100}
    assert OrderConfig(micro_batch_size=4, **order).identity() == order, "that of every training so far"
    matters = OrderConfig(micro_batch_size=4, micro_batches_matter=True, **order).identity()
    assert matters == order | {"micro_batch_size": 4}
    by_column = OrderConfig(micro_batch_size=4, bucket_column="category", **order).identity()
    assert by_column == order | {"micro_batch_size": 4, "bucket_column": "category"}


def test_hundreds_of_buckets_are_planned_in_little_time():
    rows = [300 + 7 * number % 50 for number in range(2000)]
    plan = plan_of(rows, window_rows=512)
    assert len(plan.sources) == 2000 and plan.micro_batch(100_000, 0, 1).rows.size == MICRO


@checked
@given(values=st.lists(st.sampled_from("abcd"), min_size=4, max_size=60), seed=st.integers(0, 4))
def test_rows_of_a_bucket_that_lie_apart_come_once_per_epoch_of_it(values, seed):
    found, order = (
        row_buckets(values),
        OrderConfig(seed=seed, global_batch_size=8, micro_batch_size=4, bucket_column="c"),
    )
    plan = plan_tables(["/t"], [table_of([len(values)])], (), order, holdout_rows=0, num_steps=1000, buckets=[found])
    seen = defaultdict(Counter)
    for number in range(60):
        one = plan.micro_batch(number, 0, 1)
        assert len({values[row] for row in one.rows.tolist()}) == 1
        seen[values[one.rows[0]]].update(zip(one.epochs.tolist(), one.rows.tolist(), strict=True))
        told = [plan.micro_batch(number // 2, number % 2, 2), one]
        assert told[0].rows.tolist() == told[1].rows.tolist(), "the same on two workers"
    for value, counts in seen.items():
        first = {row for epoch, row in counts if epoch == 0}
        assert set(counts.values()) == {1} and first <= {row for row, its in enumerate(values) if its == value}
        assert max(epoch for epoch, _ in counts) == 0 or len(first) == values.count(value)
    assert {source.first_row for source in plan.sources} == set(np.cumsum([0, *map(values.count, sorted(seen))])[:-1])


def test_buckets_of_listed_rows_hold_each_row_once():
    order = OrderConfig(global_batch_size=4, micro_batch_size=2, bucket_column="c")
    for rows in ([0, 1, 1], [0, 1, 3], [0, 1]):
        listed = RowBuckets(buckets=(("a", 3),), rows=np.array(rows))
        with pytest.raises(BucketError, match="do not hold each of its 3 rows once"):
            plan_tables(["/t"], [table_of([3])], (), order, holdout_rows=0, num_steps=1, buckets=[listed])
    with pytest.raises(ValueError, match="lists 2 rows"):
        Source(uri="/t", order=SampleOrder(num_rows=3, batch=1), rows=(0, 1))


ROWS = [30, 3, 64, 7, 120, 1, 75]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("buckets")
    names = [f"b{bucket}" for bucket, rows in enumerate(ROWS) for _ in range(rows)]
    rows = pa.table({"text": [f"{name} {row}" for row, name in enumerate(names)]})
    files = tuple(write_part(str(place), str(n), rows.slice(n, 150), row_group_rows=16) for n in (0, 150))
    write_manifest(str(place), Manifest(kind="pairs", files=files, buckets=bucket_runs(names)))
    return place


def disk_plan(table: Path) -> StreamPlan:
    order = OrderConfig(
        global_batch_size=GLOBAL, micro_batch_size=MICRO, lanes=2, window_rows=32, bucket_column="category", seed=5
    )
    manifests = [read_manifest(str(table))] * 2
    return plan_tables([str(table)] * 2, manifests, ("text",), order, holdout_rows=0, num_steps=90)


def read(plan: StreamPlan, rank: int, num_workers: int, first_step: int = 0) -> list[tuple[list, list, list]]:
    """Texts, epochs and row numbers of each micro-batch of a worker."""
    found = []
    for chunk in PlanReader(plan, rank, num_workers, first_step):
        for part in chunk.column("micro_batch"):
            one = pa.ipc.open_stream(part.as_buffer()).read_all()
            found.append(tuple(one.column(name).to_pylist() for name in ("text", "epoch", "row")))
    return found


def test_what_is_read_is_what_is_planned_on_any_workers_and_from_any_step(table):
    plan = disk_plan(table)
    alone = read(plan, 0, 1)
    assert len(alone) == 90 * GLOBAL // MICRO
    for number, (texts, epochs, rows) in enumerate(alone):
        wanted = plan.micro_batch(number, 0, 1)
        assert {text.split()[0] for text in texts} == {f"b{wanted.source % len(ROWS)}"}
        assert [int(text.split()[1]) for text in texts] == wanted.rows.tolist()
        assert rows == (wanted.rows + plan.first_rows[wanted.source]).tolist() and epochs == wanted.epochs.tolist()
    for workers in (2, 4):
        per_step, parts = plan.per_step(workers), [read(plan, rank, workers) for rank in range(workers)]
        together = [part[step * per_step : (step + 1) * per_step] for step in range(90) for part in parts]
        assert [one for share in together for one in share] == alone
    for step in (1, 17, 89):
        assert read(plan, 0, 1, first_step=step) == alone[step * GLOBAL // MICRO :]
        halves = [read(plan, rank, 2, first_step=step) for rank in range(2)]
        assert sum(map(len, halves)) == len(alone) - step * GLOBAL // MICRO


def test_each_table_is_opened_once_however_many_buckets_it_has(table):
    plan = disk_plan(table)
    assert len(PlanReader(plan, 0, 1, 0)._readers) == 2
    assert all(before < after for before, after in pairwise(dict.fromkeys(plan.table_of)))


def test_a_table_that_was_replaced_since_the_start_is_not_trained_on(tmp_path):
    uri = str(tmp_path / "table")
    schema = pa.schema([pa.field("caption", pa.string())])

    def write(text: str) -> Manifest:
        part = write_part(uri, "part-0.parquet", pa.table({"caption": [text] * 8}, schema))
        manifest = Manifest(kind="texts", files=(part,))
        (tmp_path / "table/manifest.json").unlink(missing_ok=True)
        write_manifest(uri, manifest)
        return manifest

    order = OrderConfig(global_batch_size=4, micro_batch_size=4)
    plan = plan_tables([uri], [write("first")], ("caption",), order, holdout_rows=0, num_steps=2)
    PlanReader(plan, 0, 1, 0)
    write("other")
    with pytest.raises(ManifestError, match=r"has the digest [0-9a-f]{64} here, and [0-9a-f]{64} where the training"):
        PlanReader(plan, 0, 1, 0)


def test_rows_that_lie_apart_are_read_as_planned_on_any_workers_and_from_any_step(table):
    """Clusters that lie all over two files."""
    uri, rows = str(table), sum(ROWS)
    clusters = [f"{(row * row) % 11}" for row in range(rows)]
    order = OrderConfig(
        global_batch_size=GLOBAL, micro_batch_size=MICRO, lanes=2, window_rows=32, bucket_column="cluster", seed=5
    )
    plan = plan_tables(
        [uri] * 2, [read_manifest(uri)] * 2, ("text",), order, holdout_rows=0, num_steps=60,
        buckets=[row_buckets(clusters), row_buckets(clusters[::-1])],
    )  # fmt: skip
    alone = read(plan, 0, 1)
    for number, (texts, _, seen) in enumerate(alone):
        wanted = plan.micro_batch(number, 0, 1)
        assert [int(text.split()[1]) for text in texts] == wanted.rows.tolist()
        assert seen == (wanted.rows + plan.first_rows[wanted.source]).tolist()
    assert {row for _, _, seen in alone for row in seen} == set(range(2 * rows)), "unique over both tables"
    halves = [read(plan, rank, 2, first_step=7) for rank in range(2)]
    per_step = plan.per_step(2)
    together = [half[step * per_step : (step + 1) * per_step] for step in range(53) for half in halves]
    assert [one for share in together for one in share] == alone[7 * GLOBAL // MICRO :]
