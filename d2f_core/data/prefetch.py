"""Items of an iterator, taken ahead of time by a thread."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
LOOK_SECONDS = 1.0
"""Between two looks of a thread that waits for room whether anybody still wants its items."""


class _End:
    """What follows the last item: nothing, or the error that ended the iterator."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetcher(Iterator[T]):
    """The same items in the same order; a thread begins at once to take them, up to `depth` before they are wanted.

    An error of `items` comes where its item would have come. Closing this, or forgetting it, ends the thread.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._ready: queue.Queue[T | _End] = queue.Queue(depth)
        self._unwanted = threading.Event()
        # Not a method of this: a thread that holds `self` would keep it from being forgotten. A daemon: what waits
        # for something that never comes must not keep the process from ending.
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
    except BaseException as caught:  # whatever it is, the consumer must hear of it
        error = caught
    _put(_End(error), ready, unwanted)


def _put(item: "T | _End", ready: "queue.Queue[T | _End]", unwanted: threading.Event) -> None:
    while not unwanted.is_set():
        with contextlib.suppress(queue.Full):
            return ready.put(item, timeout=LOOK_SECONDS)
