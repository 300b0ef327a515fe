"""What a training does when it is told that its end is near: it saves once, and stops or goes on.

A node's notice (Ray drains it, for example because a spot instance will be reclaimed): all workers save, and go on
until Ray ends the attempt. SIGTERM to the driver (`ray job stop`, Kubernetes): all workers save, and the training
stops.
"""

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray.train

from d2f_core.train import checkpoint
from d2f_core.train.heartbeat import Heartbeat, ask

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""Between two looks for a notice. One is a round trip of all workers to an actor, some milliseconds; Ray itself learns
of a notice every five seconds."""
QUESTIONS = 10
"""Of the driver to the list of workers, some seconds apart, while it does not answer."""
NOTHING, POLL, STOP = 0, 1, 2
"""What the first worker tells all with a step: go on, look for notices of nodes that go, or save and stop."""
EXIT_CODE = 128 + signal.SIGTERM


class Interruptions:
    """One worker's side. The first worker decides at which step all poll for a notice, or stop."""

    def __init__(self, heartbeat: Heartbeat, *, first: bool) -> None:
        self._heartbeat, self._first = heartbeat, first
        self._polled, self._known = -math.inf, set[str]()
        self.stopping = False

    def signal(self) -> int:
        """This worker's number for the step under way.

        All but the first worker give 0, so the sum over the workers, which each gets, is the first worker's signal.
        """
        if not self._first:
            return NOTHING
        if self._heartbeat.stop_asked:
            return STOP
        if time.monotonic() - self._polled < POLL_SECONDS:
            return NOTHING
        self._polled = time.monotonic()
        return POLL

    def agreed(self, signals: int, step: int) -> bool:
        """Whether to save at this step, due or not.

        Args:
            signals: the sum of all workers' `signal`. Every worker must call it, and gets the same answer.
        """
        if signals == STOP:
            self.stopping = True
            if self._first:
                logger.warning("step %d  the driver was told to end: saving, then stopping", step)
            return True
        return signals == POLL and self._noticed(step)

    def _noticed(self, step: int) -> bool:
        """Whether nodes of these workers were announced to go since the last poll."""
        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_to_ranks) - self._known if info else set()
        if not info or not new:
            return False
        self._known |= new
        if self._first:
            self._heartbeat.leave(sorted(new))
            what = describe(info, new)
            logger.warning("step %d  %s: saving, then going on until Ray ends the attempt", step, what)
        return True


def describe(info: ray.train.PreemptionInfo, nodes: set[str]) -> str:
    """Which nodes go, with which workers, and when."""
    parts = [
        f"node {node[:12]} with worker {', '.join(str(rank) for rank in info.preempted_node_to_ranks[node])}"
        for node in sorted(nodes)
    ]
    when = "soon" if info.deadline_ms is None else f"in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s"
    return f"{' and '.join(parts)} will be taken away {when}"


class Termination:
    """SIGTERM to the driver while it trains."""

    def __init__(self, before_end: Callable[[], None]) -> None:
        self.asked = False
        self._before_end = before_end
        self.pulse: Any = None
        """That of the attempt under way."""
        self._wake = threading.Event()

    def handle(self, number: int, frame: object) -> None:
        """The signal's handler; a second signal ends the process at once."""
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True
        self._wake.set()

    def close(self) -> None:
        self._wake.set()

    def pass_on(self) -> None:
        """Ask the workers to stop; runs in a thread, for a handler must not wait for an answer."""
        self._wake.wait()
        if not self.asked:
            return
        there = None
        for _ in range(QUESTIONS):
            pulse = self.pulse
            # No answer, on a busy machine, is not the answer that there is nothing to save.
            there = ask(pulse.stop, default=None) if pulse is not None else False
            if there is not None:
                break
            time.sleep(1)
        if there:
            logger.warning("SIGTERM: the workers save and stop; a second one ends this process at once")
            return
        logger.warning("SIGTERM: no worker trains yet, so nothing has to be saved. The same command again resumes.")
        self._before_end()
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def terminable(before_end: Callable[[], None] = lambda: None) -> Iterator[Termination]:
    """Let SIGTERM stop the training instead of killing it, while the context lasts.

    In a thread signals are left alone: Python lets only the main thread handle them.

    Args:
        before_end: called, in a thread, before a training without workers is ended at once.
    """
    termination = Termination(before_end)
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return
    thread = threading.Thread(target=termination.pass_on, daemon=True)
    thread.start()
    before = signal.signal(signal.SIGTERM, termination.handle)
    try:
        yield termination
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
        termination.close()
        thread.join()


def terminated(output: str, identity: str) -> SystemExit:
    """The end of a stopped training; the log says from where it goes on."""
    found = checkpoint.candidates(output, identity)
    if found:
        what = f"stopped by SIGTERM; step {found[0].manifest.step} is saved in {found[0].uri}"
    else:
        what = "stopped by SIGTERM before the first checkpoint"
    logger.warning("the training was %s. The same command again resumes.", what)
    return SystemExit(EXIT_CODE)
