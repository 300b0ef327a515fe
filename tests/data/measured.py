"""Run a function in a process of its own and see what it cost: for inputs that try to use up the machine."""

import multiprocessing
import resource
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

# The server process is started anew, single-threaded, and imports once what every case needs; a case is a fork of it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.data.measured", "d2f_core.data.images", "d2f_core.data.sources", "safetensors.numpy"]
)
LAST_SECONDS = 60
"""Processor time after which the kernel ends a case that would not end."""
PATIENCE = 300
"""Seconds for one that hangs without using any."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    answer: Any
    seconds: float
    """Processor time, which a busy machine hardly changes."""
    memory: int
    """Bytes by which the process grew at its largest."""


def measure(call: Callable[..., Any], *arguments: Any) -> Cost:
    """What the call (of a function that can be imported) answers and costs. Raises EOFError when it was killed, and
    TimeoutError when it hung."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run, args=(there, call, arguments))
    process.start()
    there.close()
    try:
        if not here.poll(PATIENCE):
            raise TimeoutError(f"{call.__name__} neither answered nor ended within {PATIENCE} s.")
        return here.recv()
    finally:
        process.join(LAST_SECONDS)
        process.kill()  # or Python would wait for it at its own end
        process.join()


def _run(pipe: Connection, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LAST_SECONDS, LAST_SECONDS + 5))
    before = resource.getrusage(resource.RUSAGE_SELF)
    answer = call(*arguments)
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    pipe.send(Cost(answer=answer, seconds=seconds, memory=(after.ru_maxrss - before.ru_maxrss) * 1024))
