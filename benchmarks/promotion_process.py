"""The processes of `benchmarks.promotions`: each ends an evaluation as `pipelines.evaluate` does, or rolls back.

They are forked off a server process that has imported all of this, so that a round takes a second, not ten.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import mlflow.store.tracking.rest_store  # noqa: F401  imported on first use otherwise, in each process
import s3fs  # noqa: F401

from d2f_core import lease
from d2f_core.evaluation.pins import keep_pins, pin_models
from d2f_core.evaluation.promotion import check_may_promote, promote_candidate
from d2f_core.evaluation.record import write_files
from d2f_core.lease import LeaseTimes
from d2f_core.tracking import HeldAlias, rollback, server

ALIAS = "champion"
REPORT = "metrics.json"
WRITES = "writes"
"""Said before each request that changes the registry."""
SECONDS = 180.0


@dataclass(frozen=True, kw_only=True)
class Act:
    """What a process does."""

    name: str
    """The registered model."""
    candidate: str = ""
    """Version that is promoted; empty: the alias is rolled back."""
    output: str = ""
    """Of the evaluation."""
    variables: Mapping[str, str]
    """By which it finds the servers."""
    stale: float
    """Seconds after which a lease that is not renewed is taken over."""
    patience: float = 60.0
    """Seconds for which a registry that is away is asked again."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a process is disturbed."""

    request: int
    """Before this one of its requests that change the registry, or when it has ended; 0: when it goes on."""
    seconds: float
    """So long after that."""

    def __str__(self) -> str:
        return f"{1000 * self.seconds:.0f} ms after {f'its request {self.request}' if self.request else 'the start'}"


class Process:
    """A process that waits before the promotion until it is told to go on."""

    def __init__(self, act: Act) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=run, args=(act, other))
        self._process.start()
        self._last: str | None = None
        other.close()
        if (said := self._hear()) != "ready":
            raise SystemExit(f"a process did not begin: {said}")

    def go(self, until: Moment | None = None) -> None:
        """Go on; returns at the moment, or at once."""
        self._pipe.send("go")
        if until is None:
            return
        for _ in range(until.request):
            if self._last is None and (said := self._hear()) != WRITES:
                self._last = said
        time.sleep(until.seconds)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def end(self) -> tuple[int, str]:
        """Exit status, and the error if there was one."""
        said = self._last
        while said is None or said == WRITES:
            said = self._hear()
        self._process.join(SECONDS)
        return int(self._process.exitcode or 0), said

    def _hear(self) -> str:
        if not self._pipe.poll(SECONDS):
            self.kill()
            return f"silence for {SECONDS:.0f} s"
        try:
            return self._pipe.recv()
        except EOFError:
            return "killed"


def run(act: Act, pipe: Connection) -> None:
    os.environ.update(act.variables)
    lease.TIMES = LeaseTimes(renew=act.stale / 5, stale=act.stale)
    server.RETRY_SECONDS = act.patience
    write = HeldAlias._write

    def tell_and_write(self: HeldAlias, what: str, call: Callable[[], Any]) -> Any:
        pipe.send(WRITES)
        return write(self, what, call)

    HeldAlias._write = tell_and_write
    try:
        evaluate(act, pipe) if act.candidate else roll_back(act, pipe)
        pipe.send("")
    except ValueError as error:
        pipe.send(f"{type(error).__name__}: {error}")
        sys.exit(1)


def roll_back(act: Act, pipe: Connection) -> None:
    wait(pipe)
    rollback(act.name, ALIAS)


def evaluate(act: Act, pipe: Connection) -> None:
    """An evaluation that passes its gate: in place of images there is nothing, in place of the report one sentence."""
    uri = f"models:/{act.name}/{act.candidate}"
    pins = pin_models(act.output, candidate=uri, champion="auto", champion_alias=ALIAS, base="")
    check_may_promote(pins, act.output, alias=ALIAS)
    keep_pins(act.output, pins)
    wait(pipe)
    promotion = promote_candidate(pins, act.output, alias=ALIAS)
    results: dict[str, Any] = {"promotion": promotion.text}
    write_files(act.output, {REPORT: json.dumps(results).encode()})
    if promotion.error:
        raise promotion.error


def wait(pipe: Connection) -> None:
    pipe.send("ready")
    pipe.recv()
