"""Send a command to the stack's Ray head as one job, show its output, hand back its exit code."""

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra.local.part import ask, command
from infra.local.ray_head import ACTIVE

INTERRUPTED = 130


def submit(argv: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run `ray job submit` from the current directory, which is the job's code.

    Ray itself leaves out what .gitignore names, and .git, .venv and __pycache__. When the same command runs already
    (an earlier client was killed), its job is followed instead: two of them would write the same outputs.
    Ctrl-C and SIGTERM stop the job as well.

    Returns: the exit code of the command; 1 when it never ran, or was stopped; 130 after Ctrl-C.

    Raises:
        StackError: the stack does not answer any more, so that the job's end is not known.
    """
    running = _running(shlex.join(argv), variables)
    if running:
        print(f"the same command runs already as job {running}; this is its output")
        client, job = ["job", "logs", "--follow", running], running
    else:
        job = f"d2f-{os.getpid()}-{os.urandom(4).hex()}"
        client = ["job", "submit", "--submission-id", job, "--working-dir", ".", "--", *argv]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A session of its own: Ctrl-C must not end the client before it can be told to stop the job.
    # Unbuffered: piped into a file, its lines would come in lumps of 8 KB, minutes late.
    environment = {**os.environ, **variables, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([command("ray"), *client], env=environment, start_new_session=True)
    try:
        process.wait()
        return exit_code(job, variables)  # the client's own is 0 for a job that was stopped
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop = [command("ray"), "job", "stop", job]
        subprocess.run(stop, env={**os.environ, **variables}, check=False, timeout=60)
        process.terminate()
        process.wait(timeout=20)
        return INTERRUPTED


def exit_code(job: str, variables: Mapping[str, str]) -> int:
    """The exit code of an ended job's command; 1 when there is none."""
    found = _jobs(job, variables)
    if found.get("status") == "SUCCEEDED":
        return 0
    return found.get("driver_exit_code") or 1


def _running(entrypoint: str, variables: Mapping[str, str]) -> str | None:
    """Id of the job that runs this command now."""
    active = [job for job in _jobs("", variables) if job["status"] in ACTIVE and job["entrypoint"] == entrypoint]
    return active[0]["submission_id"] if active else None


def _jobs(path: str, variables: Mapping[str, str]):
    token = Path(variables["RAY_AUTH_TOKEN_PATH"]).read_text()
    return ask(f"{variables['RAY_API_SERVER_ADDRESS']}/api/jobs/{path}", token=token)
