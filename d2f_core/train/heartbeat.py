"""Which worker keeps the others waiting: each says from a thread of its own that it is alive, and what it does."""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

logger = logging.getLogger(__name__)

BEAT_SECONDS, SILENT_SECONDS = 1.0, 15.0


@dataclass
class State:
    """What a worker was last heard of."""

    where: str
    """Host and process."""
    doing: str
    step: int
    since: float
    """Seconds that it has been doing so, when it said it."""
    heard: float
    """Clock of the actor that keeps the list."""


@ray.remote(num_cpus=0)
class Pulse:
    """Keeps what each worker said last."""

    def __init__(self) -> None:
        self._states: dict[int, State] = {}

    def beat(self, rank: int, where: str, doing: str, step: int, since: float) -> None:
        self._states[rank] = State(where, doing, step, since, time.monotonic())

    def silent(self, seconds: float) -> dict[int, str]:
        """Workers that were not heard of for longer: rank -> a phrase."""
        now = time.monotonic()
        return {
            rank: f"worker {rank} ({state.where}) was last heard of {now - state.heard:.0f} s ago, at step "
            f"{state.step}, {state.doing}"
            for rank, state in sorted(self._states.items())
            if now - state.heard > seconds
        }

    def report(self) -> list[str]:
        """A phrase per worker."""
        return [
            f"worker {rank} ({state.where}): step {state.step}, {state.doing} for {state.since:.0f} s"
            for rank, state in sorted(self._states.items())
        ]


class Heartbeat:
    """One worker's side. `doing` is set by the training loop."""

    def __init__(self, pulse: Any, rank: int) -> None:
        self._pulse, self._rank = pulse, rank
        self._doing, self._began, self.step = "starting", time.monotonic(), 0
        self._end = threading.Event()
        self._where = f"{socket.gethostname()}, process {os.getpid()}"
        threading.Thread(target=self._beat, daemon=True).start()

    def doing(self, what: str) -> None:
        self._doing, self._began = what, time.monotonic()

    def stop(self) -> None:
        self._end.set()

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            since = time.monotonic() - self._began
            self._pulse.beat.remote(self._rank, self._where, self._doing, self.step, since)


@contextlib.contextmanager
def watched(pulse: Any) -> Iterator[None]:
    """Log a line when a worker falls silent, while the context lasts."""
    end, named = threading.Event(), set[int]()

    def watch() -> None:
        while not end.wait(SILENT_SECONDS / 3):
            silent = ask(pulse.silent, SILENT_SECONDS, default={})
            for rank in silent.keys() - named:
                logger.warning("%s; the others wait for it", silent[rank])
            named.clear()
            named.update(silent)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def ask(method: Any, *args: Any, default: Any) -> Any:
    """An answer of the pulse within a few seconds; `default` when it is gone with its node."""
    try:
        return ray.get(method.remote(*args), timeout=5)
    except (RayError, TimeoutError) as error:
        logger.warning("the list of workers does not answer: %s", type(error).__name__)
        return default
