"""A refusal inside an actor reaches the driver as the one line that it is.

Ray keeps of an exception its traceback's text; so what this project refuses (a model with another hash on some node, a
base that lacks a part) travels as data, and is raised again where the job was started.
"""

import logging
from typing import Any

logger = logging.getLogger(__name__)

PROBLEM = "problem"


class RefusedError(ValueError):
    """What an actor refused, with the reason and the fix."""


def refusal(error: Exception) -> str | None:
    """The text of an error that is this project's own word to a user, or a subclass of such an error in a system built
    on it; None for any other, which is a fault.
    """
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    own = isinstance(error, ValueError) and "d2f_core" in packages
    return str(error) if own else None


def refusal_or_raise(error: Exception) -> str:
    """The text of a refusal, whose traceback goes to the log; a fault is raised again."""
    if (text := refusal(error)) is None:
        raise error
    logger.error("refused", exc_info=error)
    return text


def guarded(actor: type) -> type:
    """An actor class of Ray Data's, under the same name, whose refusals are its result: `problem` in place of a row."""

    class Guarded:
        def __init__(self, *arguments: Any) -> None:
            self._actor, self._problem = None, None
            try:
                self._actor = actor(*arguments)
            except ValueError as error:
                self._problem = refusal_or_raise(error)

        def __call__(self, batch: Any) -> dict[str, Any]:
            if self._actor is None:
                return {PROBLEM: [self._problem]}
            try:
                return self._actor(batch)
            except ValueError as error:
                return {PROBLEM: [refusal_or_raise(error)]}

    Guarded.__name__ = Guarded.__qualname__ = actor.__name__
    return Guarded


def checked(row: dict[str, Any]) -> dict[str, Any]:
    """The result of a guarded actor.

    Raises:
        RefusedError: it refused.
    """
    if problem := row.get(PROBLEM):
        raise RefusedError(problem)
    return row
