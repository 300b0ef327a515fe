"""Sharing an evaluation's items over workers."""

from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_core.train.task import share_of


@settings(deadline=None, derandomize=True)
@given(count=st.integers(1, 50), num_workers=st.integers(1, 20))
def test_counting_shares_are_all_items_in_order_and_no_share_is_empty(count: int, num_workers: int):
    items = list(range(count))
    shares = [share_of(count, rank, num_workers) for rank in range(num_workers)]
    assert [item for share, counts in shares if counts for item in items[share]] == items
    sizes = [len(items[share]) for share, _ in shares]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
