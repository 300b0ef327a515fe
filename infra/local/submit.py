"""Submit a command to the stack's Ray head as one job, show its output, and return its exit code."""

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from d2f_core.progress import TOLD, UNDER_WAY
from infra.local.part import ask, command
from infra.local.processes import StackError, tail
from infra.local.ray_head import ACTIVE, temp_directory
from infra.local.state import JOB_LOG

INTERRUPTED = 130
CLOCK_SECONDS, FOLLOW_SECONDS = 1.0, 0.3
CHUNK = 2**16


def submit(argv: Sequence[str], variables: Mapping[str, str], directory: Path, *, quiet: bool = False) -> int:
    """Run `ray job submit` from the current directory, which is the job's code, and follow the job.

    Ray does not upload what .gitignore names, nor .git, .venv and __pycache__. When the same command is already running
    (an earlier client was killed), that job is followed instead, because two jobs would write the same outputs. Ctrl-C
    and SIGTERM stop the job as well.

    Args:
        directory: the stack's directory.
        quiet: keep the job's output in DIRECTORY/logs/job.log, and show only progress lines (`d2f_core.progress.tell`),
            or the end of the log when the command fails.

    Returns: the exit code of the command; 1 when it never ran, or was stopped; 130 after Ctrl-C.

    Raises:
        StackError: the stack no longer answers, so the job's result is unknown.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    job = _running(shlex.join(argv), variables)
    try:
        if job:
            print(f"the same command runs already as job {job}; this is its output", flush=True)
        else:
            job = f"d2f-{os.getpid()}-{os.urandom(4).hex()}"
            _hand_over(argv, job, variables)
            if not quiet:
                print(f"Job '{job}' submitted successfully", flush=True)
        return _show_quietly(job, variables, directory) if quiet else _show_all(job, variables, directory)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop = [command("ray"), "job", "stop", str(job)]
        subprocess.run(stop, env={**os.environ, **variables}, check=False, timeout=60, stdout=subprocess.DEVNULL)
        return INTERRUPTED


def _hand_over(argv: Sequence[str], job: str, variables: Mapping[str, str]) -> None:
    """Submit like `ray job submit --working-dir .`, but without starting a second process.

    Raises:
        StackError: the job server refuses the job; contains its message.
    """
    os.environ.update(variables)  # Ray's client finds the token there
    from ray.job_submission import JobSubmissionClient  # here, because it takes a second

    logging.disable(logging.WARNING)  # hide Ray's messages about packed files
    try:
        JobSubmissionClient(variables["RAY_API_SERVER_ADDRESS"]).submit_job(
            entrypoint=shlex.join(argv), submission_id=job, runtime_env={"working_dir": "."}
        )
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise StackError(f"the job server does not take the job: {error}") from None
    finally:
        logging.disable(logging.NOTSET)


def _show_all(job: str, variables: Mapping[str, str], directory: Path) -> int:
    for text in follow(job, variables, directory):
        print(text, end="", flush=True)
    code = exit_code(job, variables)
    print(f"job {job} succeeded" if not code else f"job {job} failed ({code})", flush=True)
    return code


def _show_quietly(job: str, variables: Mapping[str, str], directory: Path) -> int:
    log = directory / JOB_LOG
    with log.open("w") as file:
        show(_lines(follow(job, variables, directory), file), sys.stdout)
    code = exit_code(job, variables)
    if code:
        print(f"\nThe command failed ({code}). The end of {log}:\n{tail(log)}", file=sys.stderr)
    return code


def follow(job: str, variables: Mapping[str, str], directory: Path) -> Iterator[str]:
    """The output of a job of this stack, as it is printed, until the job has ended.

    Read from the head's log file: Ray's own client polls only once per second, and takes longer to notice the end.
    """
    log = temp_directory(directory) / "session_latest/logs" / f"job-driver-{job}.log"
    file: TextIO | None = None
    while True:
        ended = _jobs(job, variables).get("status") not in ACTIVE  # before the last read
        if file is None and log.exists():
            file = log.open(errors="replace", newline="")
        while text := file.read(CHUNK) if file else "":
            yield text
        if ended:
            break
        time.sleep(FOLLOW_SECONDS)
    if file:
        file.close()


def _lines(texts: Iterable[str], file: TextIO) -> Iterator[str]:
    """Complete lines from pieces of text, which are also written to a file."""
    rest = ""
    for text in texts:
        file.write(text)
        file.flush()
        *lines, rest = (rest + text).split("\n")
        yield from lines
    if rest:
        yield rest


def show(lines: Iterable[str], screen: TextIO) -> None:
    """Print a job's lines for the waiting user (those of `tell`), joining the two halves of a line; a terminal shows
    the elapsed seconds in between.
    """
    clock = _Clock(screen)
    for line in lines:
        told = line.rstrip("\n")
        if not told.startswith(TOLD):
            continue
        told = told.removeprefix(TOLD)
        clock.stop()
        if told.startswith(UNDER_WAY):
            print(told, file=screen, flush=True)
        elif told.endswith(UNDER_WAY):
            print(told.removesuffix(UNDER_WAY), end="", file=screen, flush=True)
            clock.start()
        else:
            print(told, file=screen, flush=True)
    if clock.stop():
        print(file=screen, flush=True)


class _Clock:
    """Shows elapsed seconds at the end of an unfinished line on a terminal."""

    def __init__(self, screen: TextIO) -> None:
        self._screen, self._end = screen, threading.Event()
        self._thread: threading.Thread | None = None
        self._runs = False

    def start(self) -> None:
        self._runs, self._end = True, threading.Event()
        if self._screen.isatty():
            self._thread = threading.Thread(target=self._run, args=(self._end,), daemon=True)
            self._thread.start()

    def stop(self) -> bool:
        """Stop the clock; returns whether a line was unfinished."""
        runs, self._runs = self._runs, False
        self._end.set()
        if self._thread:
            self._thread.join()
            self._thread = None
        return runs

    def _run(self, end: threading.Event) -> None:
        began = time.monotonic()
        while not end.wait(CLOCK_SECONDS):
            text = f" {time.monotonic() - began:4.0f} s"
            with contextlib.suppress(OSError):  # the terminal was closed
                print(text + "\b" * len(text), end="", file=self._screen, flush=True)


def exit_code(job: str, variables: Mapping[str, str]) -> int:
    """The exit code of an ended job's command; 1 if it has none."""
    found = _jobs(job, variables)
    if found.get("status") == "SUCCEEDED":
        return 0
    return found.get("driver_exit_code") or 1


def _running(entrypoint: str, variables: Mapping[str, str]) -> str | None:
    """Id of a running job with this command; None without one."""
    active = [job for job in _jobs("", variables) if job["status"] in ACTIVE and job["entrypoint"] == entrypoint]
    return active[0]["submission_id"] if active else None


def _jobs(path: str, variables: Mapping[str, str]):
    token = Path(variables["RAY_AUTH_TOKEN_PATH"]).read_text()
    return ask(f"{variables['RAY_API_SERVER_ADDRESS']}/api/jobs/{path}", token=token)
