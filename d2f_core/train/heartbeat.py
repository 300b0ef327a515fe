"""Finds the worker that keeps the others waiting: each reports from its own thread that it is alive, and what it does.

The same actor carries two messages between driver and first worker: that the training must stop, and that a node will
be lost.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

BEAT_SECONDS, SILENT_SECONDS = 1.0, 15.0


@dataclass
class State:
    """The last report of a worker."""

    where: str
    """Host name and process id."""
    doing: str
    step: int | None
    """Last finished step; None before the worker trains."""
    since: float
    """Seconds that the worker had been doing it at the time of the report."""
    heard: float
    """Time of the report by the actor's clock."""

    @property
    def at(self) -> str:
        return self.doing if self.step is None else f"step {self.step}, {self.doing}"


@ray.remote(num_cpus=0)
class HeartbeatMonitor:
    """Ray actor that keeps each worker's last report."""

    def __init__(self) -> None:
        self._states: dict[int, State] = {}
        self._stopping = False
        self._leaving: list[str] = []

    def beat(self, rank: int, where: str, doing: str, step: int | None, since: float) -> bool:
        """Store a worker's report; returns whether the training must stop."""
        self._states[rank] = State(where, doing, step, since, time.monotonic())
        return self._stopping

    def stop(self) -> bool:
        """Ask the workers to save and stop; returns whether any has begun to train."""
        self._stopping = True
        return any(state.step is not None for state in self._states.values())

    def leave(self, nodes: list[str]) -> None:
        """Record the ids of nodes that were announced as leaving."""
        self._leaving += nodes

    def leaving(self) -> list[str]:
        return self._leaving

    def silent(self, seconds: float) -> dict[int, str]:
        """Workers without a report for more than `seconds`: rank -> description."""
        now = time.monotonic()
        return {
            rank: f"worker {rank} ({state.where}) was last heard of {now - state.heard:.0f} s ago: {state.at}"
            for rank, state in sorted(self._states.items())
            if now - state.heard > seconds
        }

    def report(self) -> list[str]:
        """A description of each worker."""
        return [
            f"worker {rank} ({state.where}): {state.at} for {state.since:.0f} s"
            for rank, state in sorted(self._states.items())
        ]


class Heartbeat:
    """Sends one worker's reports. The training loop sets `doing` and `step`."""

    def __init__(self, pulse: Any, rank: int) -> None:
        self._pulse, self._rank = pulse, rank
        self._doing, self._began = "starting", time.monotonic()
        self.step: int | None = None
        """Last finished step; None before the worker trains."""
        self.stop_asked = False
        """On the first worker: whether the driver wants the training to stop."""
        self._end = threading.Event()
        self._where = f"{socket.gethostname()}, process {os.getpid()}"
        threading.Thread(target=self._beat, daemon=True).start()

    def doing(self, what: str) -> None:
        self._doing, self._began = what, time.monotonic()

    def begin(self, step: int) -> None:
        """Report that training begins after `step`; when the first worker's call returns, the driver has been told."""
        self.step = step
        self._say()

    def leave(self, nodes: list[str]) -> None:
        """Tell the driver that nodes were announced as leaving."""
        self._pulse.leave.remote(nodes)

    def stop(self) -> None:
        self._end.set()

    def _beat(self) -> None:
        while not self._end.is_set():
            self._say()
            self._end.wait(BEAT_SECONDS)

    def _say(self) -> None:
        state = self._rank, self._where, self._doing, self.step, time.monotonic() - self._began
        if self._rank or self.stop_asked:
            self._pulse.beat.remote(*state)
        elif ask(self._pulse.beat, *state, default=False):
            self.stop_asked = True


def start_pulse() -> Any:
    """Start the actor on the driver's node, so that it is not lost with a worker's. (A soft affinity could place it
    anywhere.)
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return cast(Any, HeartbeatMonitor).options(scheduling_strategy=here).remote()


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
    """Result of a call to the actor; `default` if it does not answer within 5 seconds or is lost."""
    try:
        return ray.get(method.remote(*args), timeout=5)
    except (RayError, TimeoutError) as error:
        logger.warning("the list of workers does not answer: %s", type(error).__name__)
        return default
