"""The order of samples: exactly once per epoch, whatever the workers and wherever a run resumes."""

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_core.data.sample_order import BucketSchedule, RowSchedule, SampleOrder, _permutation, _windows
from d2f_core.data.stream_plan import Source, StreamPlan

orders = st.builds(
    SampleOrder,
    num_rows=st.integers(31, 400),
    holdout_rows=st.integers(0, 30),
    seed=st.integers(0, 5),
    batch=st.sampled_from([1, 4, 12, 32]),
    lanes=st.sampled_from([1, 3, 16]),
    window_rows=st.sampled_from([1, 8, 50, 512]),
)
checked = settings(deadline=None, derandomize=True)


@checked
@given(order=orders, epoch=st.integers(0, 3))
def test_every_training_row_exactly_once_per_epoch_and_no_held_out_one(order, epoch):
    count = order.num_samples
    epochs, rows = order.at(np.arange(epoch * count, (epoch + 1) * count))
    assert (epochs == epoch).all()
    assert sorted([*rows.tolist(), *order.holdout().tolist()]) == list(range(order.num_rows))


@checked
@given(order=orders, data=st.data())
def test_a_position_alone_decides_its_row(order, data):
    position = data.draw(st.integers(0, 4 * order.num_samples))
    around = np.arange(max(0, position - 40), position + 40)
    assert order.at(np.array([position]))[1][0] == order.at(around)[1][around == position][0]


@checked
@given(order=orders)
def test_a_row_lies_within_its_window(order):
    _, rows = order.at(np.arange(order.num_samples))
    for row, window in zip(rows.tolist(), order.window_of(rows).tolist(), strict=True):
        first, end = order.window_bounds(window)
        assert first <= row < end


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_rows": 1}, "13f62754e75da16d"),
        ({"num_rows": 7, "batch": 3}, "401e21cb0977a508"),
        ({"num_rows": 1000, "seed": 3, "batch": 64}, "09ec4cbe109397bd"),
        ({"num_rows": 1000, "seed": 3, "batch": 64, "window_rows": 50}, "ffa365be163b6924"),
        (
            {"num_rows": 1003, "holdout_rows": 31, "seed": 1, "batch": 48, "lanes": 5, "window_rows": 33},
            "44889f232c82e1d9",
        ),
        ({"num_rows": 5000, "holdout_rows": 32, "seed": 2, "batch": 64}, "a5eb74f3bffeba5d"),
        ({"num_rows": 4096, "holdout_rows": 3000, "batch": 12, "lanes": 7, "window_rows": 10}, "ab38410073c7f83a"),
        ({"num_rows": 600, "holdout_rows": 599, "batch": 4}, "ae690b3b20761881"),
        ({"num_rows": 32768, "seed": 9, "batch": 96, "lanes": 64, "window_rows": 100}, "436083c1b62ab8a9"),
    ],
)
def test_the_order_is_that_of_every_release(fields, expected):
    """A training goes on with it: what 67c14c5 drew over three epochs, by its hash."""
    order = SampleOrder(**fields)
    drawn = [*order.at(np.arange(3 * order.num_samples + 5)), order.holdout()]
    assert hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in drawn)).hexdigest()[:16] == expected


def test_the_worked_examples_are_true():
    order = SampleOrder(num_rows=9, batch=4, lanes=2, window_rows=2)
    assert order._in_lanes(np.arange(9)).tolist() == [0, 1, 5, 6, 2, 3, 7, 4, 8]
    seed = next(seed for seed in range(100) if _windows(3, seed, 0)[0].tolist() == [1, 2, 0])
    order = SampleOrder(num_rows=7, window_rows=3, seed=seed)
    samples = order._shuffled(0, np.arange(7)).tolist()
    assert [sorted(samples[:3]), samples[3], sorted(samples[4:])] == [[3, 4, 5], 6, [0, 1, 2]]
    assert samples[5] == _permutation(3, seed, 0 * 3 + 0, "order")[1]


def test_buckets_and_micro_batches_are_those_of_every_release():
    schedule = BucketSchedule(batches=(3, 11, 1, 7), seed=5)
    steps = [schedule.at(step) for step in range(100)]
    sources = tuple(
        Source(
            uri=str(rows), order=SampleOrder(num_rows=rows, holdout_rows=5, seed=4, batch=32, window_rows=40, lanes=3)
        )
        for rows in (200, 77, 500)
    )
    plan = StreamPlan(
        sources=sources, columns=(), global_batch_size=32, micro_batch_size=4, num_steps=100, seed=4
    )  # fmt: skip
    drawn = [plan.micro_batch(number, 1, 2) for number in range(400)]
    told = [(one.source, one.epochs.tolist(), (one.rows + plan.first_rows[one.source]).tolist()) for one in drawn]
    hashes = [hashlib.sha256(repr(value).encode()).hexdigest()[:16] for value in (steps, told)]
    assert hashes == ["95cb35e08d918e87", "302fd3dae2256eaf"]


def test_epochs_and_seeds_differ():
    drawn = [SampleOrder(num_rows=50, seed=seed).at(np.arange(100))[1].tolist() for seed in (0, 1)]
    assert drawn[0] != drawn[1] and drawn[0][:50] != drawn[0][50:]


def test_a_batch_mixes_all_lanes_and_a_worker_reads_few_windows():
    order = SampleOrder(num_rows=64 * 512, batch=64, lanes=16, window_rows=512)
    batches = [order.window_of(order.at(np.arange(64 * step, 64 * step + 64))[1]) for step in range(40)]
    assert min(len(set(windows.tolist())) for windows in batches) == 16
    read_by_first_of_four = {window for windows in batches for window in windows[:16].tolist()}
    assert len(read_by_first_of_four) <= 12, "four lanes, each inside one window or two"


def test_lanes_do_not_need_their_next_windows_all_at_once():
    order = SampleOrder(num_rows=64 * 512, batch=64, lanes=16, window_rows=512)
    seen: set[int] = set()
    new = []
    for step in range(order.num_samples // 64):
        windows = set(order.window_of(order.at(np.arange(64 * step, 64 * step + 64))[1]).tolist())
        new.append(len(windows - seen))
        seen |= windows
    assert max(new[1:]) == 1


def test_a_billion_samples_are_planned_for_each_of_a_thousand_workers_in_less_than_a_second():
    order = SampleOrder(num_rows=10**9, batch=16_384, lanes=1024)
    source = Source(uri="", order=order)
    plan = StreamPlan(
        sources=(source,), columns=(), global_batch_size=16_384, micro_batch_size=16, num_steps=10**6
    )  # fmt: skip
    for number in (0, 900_000):  # early and late in the data
        began = time.perf_counter()
        rows = plan.micro_batch(number, rank=1023, num_workers=1024).rows
        assert len(set(rows.tolist())) == 16 and time.perf_counter() - began < 1


@checked
@given(
    workers=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2, 4]),
    sizes=st.lists(st.integers(5, 40), min_size=1, max_size=3),
    step=st.integers(0, 12),
)
def test_any_number_of_workers_sees_the_same_global_batches(workers, micro, sizes, step):
    def plan(size: int) -> StreamPlan:
        sources = tuple(Source(uri="", order=SampleOrder(num_rows=rows, batch=16, window_rows=8)) for rows in sizes)
        return StreamPlan(
            sources=sources, columns=(), global_batch_size=16, micro_batch_size=size, num_steps=20
        )  # fmt: skip

    alone = plan(16).micro_batch(step, 0, 1)
    shared = plan(micro)
    parts = [
        shared.micro_batch(step * shared.per_step(workers) + part, rank, workers)
        for rank in range(workers)
        for part in range(shared.per_step(workers))
    ]
    assert {part.source for part in parts} == {alone.source}, "a batch holds one bucket"
    assert np.concatenate([part.rows for part in parts]).tolist() == alone.rows.tolist()
    assert np.concatenate([part.epochs for part in parts]).tolist() == alone.epochs.tolist()


@checked
@given(batches=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 3))
def test_buckets_take_turns_in_proportion_to_their_size_without_gaps(batches, seed):
    schedule, taken = BucketSchedule(batches=tuple(batches), seed=seed), [0] * len(batches)
    for step in range(3 * sum(batches)):
        bucket, nth = schedule.at(step)
        assert nth == taken[bucket]
        taken[bucket] += 1
    assert taken == [3 * count for count in batches]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"holdout_rows": 5}, r"holdout_rows=5 .* 5 rows"), ({"lanes": 0}, "lanes=0"), ({"batch": 0}, "batch=0")],
)
def test_an_impossible_order_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SampleOrder(num_rows=5, **fields)


@settings(deadline=None, derandomize=True)
@given(rows=st.lists(st.integers(1, 40), min_size=1, max_size=6), batch=st.integers(1, 9), seed=st.integers(0, 3))
def test_a_small_bucket_s_rows_come_no_more_often_than_those_of_others(rows, batch, seed):
    schedule, taken = RowSchedule(rows=tuple(rows), batch=batch, seed=seed), [0] * len(rows)
    for number in range(120):
        bucket, before = schedule.at(number)
        assert before == taken[bucket], "a bucket's batches follow one another"
        taken[bucket] += 1
        # A cycle gives a bucket at most one batch more or less than its share, and its own batches in any order.
        drawn = [count * batch / own for count, own in zip(taken, rows, strict=True)]
        slack = [1 + 2 * batch / own for own in rows]
        assert all(abs(one - drawn[-1]) <= off + slack[-1] for one, off in zip(drawn, slack, strict=True))


def test_turns_by_rows_are_those_of_every_release():
    schedule = RowSchedule(rows=(3, 20, 9), batch=8, seed=5)
    turns = [(1, 0), (2, 0), (1, 1), (2, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 2), (1, 6), (0, 0), (1, 7)]
    assert [schedule.at(number) for number in range(12)] == turns
    assert schedule.at(10**9)[0] in range(3), "any batch is found at once"
