"""Decides whether a failed training is restarted."""

from dataclasses import dataclass, field
from typing import Any

import ray.train

from d2f_core.ray_internals import leaving_nodes
from d2f_core.retry import UnreachableError
from d2f_core.tracking import TrackingError
from d2f_core.train.compiler import MissingCompilerError
from d2f_core.train.evaluation import CollapseError
from d2f_core.train.heartbeat import ask
from d2f_core.train.quarantine import QuarantineLimitError
from d2f_core.train.sealed import UnfinishedSaveError
from d2f_core.train.steps import NonFiniteLossError
from d2f_core.train.zero import NonFiniteGradientError

FINAL = (NonFiniteLossError, NonFiniteGradientError, CollapseError, QuarantineLimitError, MissingCompilerError)
"""A restart would end in the same error. So would it with our own errors of bad input, which are ValueErrors."""
MENDED = (TrackingError, UnfinishedSaveError, UnreachableError)
"""Our own errors that a restart may mend: a server was away, or another worker died."""
REPEATED = (ValueError, TypeError, LookupError, AttributeError, ImportError, NotImplementedError, AssertionError)
"""Errors that suggest a bug or a wrong setting: retried once; the same message again ends the run."""


def causes(error: BaseException) -> list[BaseException]:
    """The workers' own errors; final errors come before errors that followed from them."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    found = [getattr(failure, "cause", None) or failure for failure in failures]
    return sorted(found, key=lambda cause: not is_final(cause))


def reason(error: BaseException) -> str:
    """The most informative error in one line."""
    cause = causes(error)[0]
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:600]}"


def is_final(cause: BaseException) -> bool:
    if isinstance(cause, MENDED):
        return False
    return isinstance(cause, FINAL) or (isinstance(cause, ValueError) and type(cause).__module__.startswith("d2f_core"))


@dataclass
class Restarts:
    """Counts a training's consecutive failed attempts; a new checkpoint resets the count.

    A failure due to a node that was announced as leaving does not count.
    """

    limit: int
    """Most consecutive failures; -1: no limit."""
    in_a_row: int = 0
    excused: bool = False
    """Whether the last failure did not count."""
    step: int = 0
    """Of the newest checkpoint at the last failure."""
    _reason: str = ""
    _gone: set[str] = field(default_factory=set)
    """Leaving nodes that already excused a failure; each node excuses one."""

    def add(self, error: BaseException, pulse: Any, step: int) -> str:
        """Record a failure.

        Args:
            pulse: that of the attempt; None when there was none.
            step: that of the newest checkpoint, 0 without one.

        Returns:
            Why no further attempt is allowed; "" if one is.
        """
        cause, found, self.excused = causes(error)[0], reason(error), self._is_excused(error, pulse)
        suspect = isinstance(cause, REPEATED) and not isinstance(cause, MENDED)
        repeated = suspect and found == self._reason and step == self.step
        if step > self.step:
            self.in_a_row = 0
        self.step, self._reason = step, found
        self.in_a_row += not self.excused
        if is_final(cause):
            return "A restart would end alike."
        if repeated:
            return "A restart ended in the same error."
        if not self.excused and 0 <= self.limit < self.in_a_row:
            return f"That was failure {self.in_a_row} without a new checkpoint, max_failures={self.limit}."
        return ""

    def _is_excused(self, error: BaseException, pulse: Any) -> bool:
        """Whether the failure is excused: the attempt ended because a node was announced to go.

        Ray reports a preemption if it ended the attempt itself. Mostly it reports a dead worker or a broken connection
        instead; the failure is then excused if any node was announced as leaving, during the attempt or now.
        """
        nodes = leaving_nodes() | (set(ask(pulse.leaving, default=[])) if pulse is not None else set())
        if isinstance(error, ray.train.PreemptionError):
            nodes |= set(error.preemption_info.preempted_node_ids)
        deaths = getattr(error, "worker_failures", {}).values()
        excused = bool(nodes - self._gone) or any(getattr(death, "preempted", False) for death in deaths)
        self._gone |= nodes
        return excused
