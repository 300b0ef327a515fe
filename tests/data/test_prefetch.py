"""A thread takes items ahead: never more than it may, in their order, with their errors, and no longer than wanted."""

import threading
import time
from collections.abc import Iterator
from itertools import islice

import pytest

from d2f_core.data import prefetch as module
from d2f_core.data.prefetch import Prefetcher


def threads() -> int:
    return sum(thread.name == "ahead" for thread in threading.enumerate())


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def counted(taken: list[int], error: Exception | None = None) -> Iterator[int]:
    for number in range(6):
        taken.append(number)
        yield number
    if error:
        raise error


def test_items_come_in_their_order_and_are_taken_before_they_are_wanted():
    taken: list[int] = []
    items = Prefetcher(counted(taken), 2)
    wait_until(lambda: taken == [0, 1, 2])  # two wait, and one is in the thread's hand
    assert next(items) == 0
    wait_until(lambda: taken == [0, 1, 2, 3])
    time.sleep(0.1)
    assert taken == [0, 1, 2, 3], "no more than that"
    assert list(items) == [1, 2, 3, 4, 5]
    wait_until(lambda: threads() == 0)


def test_an_error_comes_after_the_items_before_it():
    seen = []
    with pytest.raises(ValueError, match="after the sixth"):
        for number in Prefetcher(counted([], ValueError("after the sixth")), 2):
            seen.append(number)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_the_thread_ends_when_nobody_wants_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)
    for wanted in (0, 1):
        taken: list[int] = []
        items = Prefetcher(counted(taken), 1)
        assert list(islice(items, wanted)) == [0][:wanted]
        del items
        wait_until(lambda: threads() == 0)
        assert len(taken) < 6
