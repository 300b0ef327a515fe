"""The order of samples: exactly once per epoch, whatever the workers and wherever a run resumes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2f_core.data.order import SampleOrder
from d2f_core.data.stream import StreamPlan


@given(rows=st.integers(2, 60), holdout=st.integers(0, 30), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_training_row_exactly_once_per_epoch_and_no_held_out_one(rows, holdout, seed, epoch):
    holdout = min(holdout, rows - 1)
    order = SampleOrder(num_rows=rows, holdout_rows=holdout, seed=seed)
    count = order.num_samples
    epochs, numbers = order.at(np.arange(epoch * count, (epoch + 1) * count))
    assert (epochs == epoch).all()
    assert sorted([*numbers.tolist(), *order.holdout().tolist()]) == list(range(rows))


def test_epochs_and_seeds_differ():
    orders = [SampleOrder(num_rows=50, seed=seed).at(np.arange(100))[1].tolist() for seed in (0, 1)]
    assert orders[0] != orders[1] and orders[0][:50] != orders[0][50:]


@given(
    workers=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2, 4]),
    first=st.integers(0, 7),
    rows=st.integers(5, 40),
)
def test_any_number_of_workers_and_any_resume_sees_the_same_global_batches(workers, micro, first, rows):
    plan = StreamPlan(
        uri="", columns=(), order=SampleOrder(num_rows=rows), global_batch_size=16, micro_batch_size=micro,
        first_step=first, num_steps=10,
    )  # fmt: skip
    assert plan.num_micro_batches(workers) * workers * micro == (10 - first) * 16
    per_step = plan.num_micro_batches(workers) // (10 - first)
    for step in range(10 - first):
        seen = [
            plan.positions(step * per_step + part, rank, workers) for rank in range(workers) for part in range(per_step)
        ]
        expected = np.arange((first + step) * 16, (first + step + 1) * 16)
        assert sorted(np.concatenate(seen).tolist()) == expected.tolist()


def test_a_holdout_as_large_as_the_table_is_refused():
    with pytest.raises(ValueError, match=r"holdout_rows=5 .* 5 rows"):
        SampleOrder(num_rows=5, holdout_rows=5)
