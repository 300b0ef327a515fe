"""The processes of this session's Ray, and waiting for what they do."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import psutil

STACK = "RAY_API_SERVER_ADDRESS"
"""All processes of a stack's Ray carry it."""


def processes(prefix: str) -> list[psutil.Process]:
    """Processes of this session's Ray, not of another's on the machine, by the title that Ray gives them."""

    def found() -> Iterator[psutil.Process]:
        for process in psutil.process_iter(["cmdline"]):
            if process.info["cmdline"] and process.info["cmdline"][0].startswith(prefix):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.environ().get(STACK) == os.environ[STACK]:
                        yield process

    return list(found())


def wait_for(what: str, condition: Callable[[], object], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come in {seconds} s"
        time.sleep(0.2)
