"""How a training reacts when its end is announced: it saves once, and stops or continues.

A node's notice (Ray drains the node, for example because a spot instance will be reclaimed): all workers save, and
continue until Ray ends the attempt. SIGTERM to the driver (`ray job stop`, Kubernetes): all workers save, and the
training stops.
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
"""Interval between polls for a notice. A poll is a round trip of all workers to an actor, a few milliseconds; Ray
itself checks for notices every five seconds."""
QUESTIONS = 10
"""Most calls of the driver to the heartbeat actor, a few seconds apart, while the actor does not answer."""
NOTHING, POLL, STOP, PAUSE = 0, 1, 2, 3
"""Signals of the first worker to all with a step: continue, poll for notices of leaving nodes, save and stop, or pause
until the first worker has evaluated."""
EXIT_CODE = 128 + signal.SIGTERM


class Interruptions:
    """One worker's part. The first worker determines the step at which all poll for a notice, or stop."""

    def __init__(self, heartbeat: Heartbeat, *, first: bool) -> None:
        self._heartbeat, self._first = heartbeat, first
        self._polled, self._known = -math.inf, set[str]()
        self.stopping = False

    def signal(self, *, pause: bool = False) -> int:
        """This worker's signal for the current step; `pause` asks for a pause, if nothing else is to be said.

        All workers but the first return 0, so the sum over the workers, which every worker receives, is the first's
        signal.
        """
        if not self._first:
            return NOTHING
        if self._heartbeat.stop_asked:
            return STOP
        if time.monotonic() - self._polled < POLL_SECONDS:
            return PAUSE if pause else NOTHING
        self._polled = time.monotonic()
        return POLL

    def agreed(self, signals: int, step: int) -> bool:
        """Whether to save at this step, regardless of the schedule.

        Args:
            signals: the sum of all workers' `signal`. Every worker must call this method, and gets the same result.
        """
        if signals == STOP:
            self.stopping = True
            if self._first:
                logger.warning("step %d  the driver was told to end: saving, then stopping", step)
            return True
        return signals == POLL and self._noticed(step)

    def _noticed(self, step: int) -> bool:
        """Whether nodes of this training's workers were announced as leaving since the last poll."""
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
    """Message that names the leaving nodes, their workers, and the time."""
    parts = [
        f"node {node[:12]} with worker {', '.join(str(rank) for rank in info.preempted_node_to_ranks[node])}"
        for node in sorted(nodes)
    ]
    when = "soon" if info.deadline_ms is None else f"in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s"
    return f"{' and '.join(parts)} will be taken away {when}"


class Termination:
    """Handles SIGTERM to the driver during a training."""

    def __init__(self, before_end: Callable[[], None] = lambda: None) -> None:
        self.asked = False
        self._before_end = before_end
        self.pulse: Any = None
        """Heartbeat actor of the current attempt."""
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
        """Ask the workers to stop; runs in a thread, because a signal handler must not block."""
        self._wake.wait()
        if not self.asked:
            return
        there = None
        for _ in range(QUESTIONS):
            pulse = self.pulse
            # A missing answer, as on a busy machine, does not mean that there is nothing to save.
            there = ask(pulse.stop, default=None) if pulse is not None else False
            if there is not None:
                break
            time.sleep(1)
        if there:
            logger.warning("SIGTERM: the workers save and stop; a second one ends this process at once")
            return
        none, unknown = "no worker trains yet, so nothing has to be saved", "the list of workers does not answer"
        logger.warning("SIGTERM: %s. The same command again resumes.", unknown if there is None else none)
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
    """The exception that ends a stopped training; logs from where it can be resumed."""
    found = checkpoint.candidates(output, identity)
    if found:
        what = f"stopped by SIGTERM; step {found[0].manifest.step} is saved in {found[0].uri}"
    else:
        what = "stopped by SIGTERM before the first checkpoint"
    logger.warning("the training was %s. The same command again resumes.", what)
    return SystemExit(EXIT_CODE)
