"""The Ray head with its job server, with token authentication and all sockets on 127.0.0.1."""

import contextlib
import hashlib
import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path

from infra.local.part import Part, ask, command, get
from infra.local.processes import POLL_SECONDS, StackError, name_of, owned
from infra.local.state import State

OBJECT_STORE_BYTES = 1_000_000_000
LOGICAL_CPUS = max(8, os.cpu_count() or 1)
"""At least 8, even on a small machine: Ray Data's tasks need slots in addition to two training workers."""
KEPT_SESSIONS = 5
JOB_STOP_SECONDS = 60
"""Seconds from `ray job stop` to SIGKILL (Ray's default is 3), in which a training saves a checkpoint."""
MARGIN_SECONDS = 5
"""Additional seconds for the end of a job."""
ACTIVE = ("PENDING", "RUNNING")
"""States of a job that has not ended."""


def ray_variables(state: State) -> dict[str, str]:
    """Environment variables with which a driver or `ray job submit` reaches the head."""
    return {
        "RAY_ADDRESS": f"127.0.0.1:{state.ports['ray']}",
        "RAY_API_SERVER_ADDRESS": state.url("ray_dashboard"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(state.token_path),
        # Makes Ray use 127.0.0.1 as the node's address (on Linux too) instead of the machine's external one.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def ray_part(state: State, client_variables: dict[str, str]) -> Part:
    """The head as a part; jobs inherit its environment, so it includes the variables for S3 and MLflow."""
    ports, temp = state.ports, temp_directory(state.directory)
    argv = (
        command("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={ports['ray']}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={ports['ray_dashboard']}", "--include-dashboard=true",
        f"--dashboard-agent-listen-port={ports['ray_agent']}", f"--ray-client-server-port={ports['ray_client']}",
        "--min-worker-port=0", "--max-worker-port=0",  # any free ports: the default range overlaps other servers
        f"--num-cpus={LOGICAL_CPUS}", f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={temp}",
        "--disable-usage-stats", "--log-color=false",
    )  # fmt: skip
    variables = {
        **{key: value for key, value in client_variables.items() if key != "RAY_ADDRESS"},
        "RAY_TMPDIR": str(temp),  # or the head registers in /tmp/ray as the machine's current cluster
        "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_SECONDS),
        # A head that is told to end first waits until it is idle, but Ray Data's own actors run forever.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "PYTHONUNBUFFERED": "1",
        "D2F_RAY_VERSION": version("ray"),
        **({} if _has_gpu() else {"DS_ACCELERATOR": "cpu"}),
    }
    return Part(
        name="ray",
        argv=argv,
        variables=variables,
        problem=lambda: _problem(state),
        address=state.url("ray_dashboard"),
        start_seconds=180.0,
        stop_seconds=20.0,
        before_start=lambda: _make_private(temp.parent),
        before_stop=lambda: _stop_jobs(state),
        after_stop=lambda: _keep_logs(temp, state.directory / "logs"),
    )


def temp_directory(directory: Path) -> Path:
    """Ray's temporary directory, one per stack; its path is short, because a Unix socket's path is limited to 107
    bytes.

    It is inside a private directory, because Ray makes its own, with sockets and logs, accessible to every user.
    """
    name = hashlib.sha256(str(directory).encode()).hexdigest()[:8]
    return Path(f"/tmp/d2f-{os.getuid()}-{name}/ray")


def _problem(state: State) -> str | None:
    # For about a second after one of these processes dies, the others still answer.
    missing = {"gcs_server", "raylet"} - {name_of(o.process) for o in owned(state.directory, "ray")}
    if missing:
        return f"no process {' and no '.join(sorted(missing))}"
    raylet = get(f"{state.url('ray_agent')}/api/local_raylet_healthz", token=state.ray_token)
    return raylet or get(f"{state.url('ray_dashboard')}/api/jobs/", token=state.ray_token)


def _stop_jobs(state: State) -> None:
    """Stop all jobs as `ray job stop` does, and wait while trainings save checkpoints; does nothing if the server is
    gone.
    """
    jobs = f"{state.url('ray_dashboard')}/api/jobs/"
    deadline = time.monotonic() + JOB_STOP_SECONDS + MARGIN_SECONDS
    told: set[str] = set()
    with contextlib.suppress(StackError):
        while active := {
            job["submission_id"]
            for job in ask(jobs, token=state.ray_token)
            if job["submission_id"] and job["status"] in ACTIVE
        }:
            for job in active - told:
                ask(f"{jobs}{job}/stop", token=state.ray_token, method="POST")
            told |= active
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_SECONDS)


def _has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _make_private(place: Path) -> None:
    place.mkdir(mode=0o700, exist_ok=True)
    if place.is_symlink() or place.stat().st_uid != os.getuid():
        raise StackError(f"{place} is not a directory of this user; Ray's temporary files need one. Remove it.")
    place.chmod(0o700)


def _keep_logs(temp: Path, logs: Path) -> None:
    """Move the sessions' logs to the stack's log directory, and remove Ray's other files."""
    for session in temp.glob("session_2*"):
        if (session / "logs").is_dir():
            shutil.copytree(session / "logs", logs / "ray" / session.name, symlinks=True, dirs_exist_ok=True)
    for old in sorted((logs / "ray").glob("session_2*"))[:-KEPT_SESSIONS]:
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(temp.parent, ignore_errors=True)
