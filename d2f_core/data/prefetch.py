"""Items of an iterator, fetched ahead of time by a thread."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
LOOK_SECONDS = 1.0
"""Interval at which a thread that waits for a free place checks whether its consumer still exists."""


class _End:
    """End marker after the last item; carries the error that ended the iterator, if any."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetcher(Iterator[T]):
    """The same items in the same order; a thread starts at once and fetches up to `depth` items ahead.

    An error of `items` is raised in place of the failed item. Closing the prefetcher, or dropping the last reference to
    it, ends the thread.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._ready: queue.Queue[T | _End] = queue.Queue(depth)
        self._unwanted = threading.Event()
        # Not a method: a thread that holds `self` would keep the prefetcher alive. A daemon: a thread that waits for an
        # item that never comes must not keep the process from ending.
        work = items, self._ready, self._unwanted
        threading.Thread(target=_take, args=work, name="ahead", daemon=True).start()

    def __next__(self) -> T:
        if self._unwanted.is_set():
            raise StopIteration
        item = self._ready.get()
        if not isinstance(item, _End):
            return item
        self.close()
        raise item.error or StopIteration

    def close(self) -> None:
        self._unwanted.set()

    def __del__(self) -> None:
        self.close()


def _take(items: Iterable[T], ready: "queue.Queue[T | _End]", unwanted: threading.Event) -> None:
    error = None
    try:
        for item in items:
            _put(item, ready, unwanted)
            if unwanted.is_set():
                return
    except BaseException as caught:  # of any type: the consumer raises it
        error = caught
    _put(_End(error), ready, unwanted)


def _put(item: "T | _End", ready: "queue.Queue[T | _End]", unwanted: threading.Event) -> None:
    while not unwanted.is_set():
        with contextlib.suppress(queue.Full):
            return ready.put(item, timeout=LOOK_SECONDS)
