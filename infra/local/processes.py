"""Server processes that outlive the command which started them: start, find again, stop.

A process belongs to a stack when its environment carries that stack's mark, or when it lives in the session, or below
a process, that does. No pid is written to disk, so a stale or reused pid cannot mislead, and a process is found even
when the command that started it died before it could take a note.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

OWNER = "D2F_LOCAL_OWNER"
POLL_SECONDS = 0.2
KILL_SECONDS = 15.0
LOG_BYTES = 10_000_000
PR_SET_PDEATHSIG = 1


class StackError(RuntimeError):
    """The local stack cannot do what was asked; the message states the value, the rule and the fix."""


@dataclass(frozen=True, kw_only=True)
class Owned:
    """A live process of a stack, with its part and the digest of the settings that it was started with."""

    process: psutil.Process
    part: str
    digest: str

    @property
    def leads(self) -> bool:
        """Whether the process was started by `launch`, that is, leads its session."""
        return _session(self.process.pid) == self.process.pid


def mark(directory: Path, part: str, digest: str) -> dict[str, str]:
    """The environment variable by which `owned` identifies a process."""
    return {OWNER: f"{directory}|{part}|{digest}"}


def owned(directory: Path, part: str | None = None) -> list[Owned]:
    """Live processes of the stack in `directory`, parents before children; only those of `part` when given."""
    processes = [p for p in psutil.process_iter() if p.pid != os.getpid() and _alive(p)]
    found: dict[int, Owned] = {}
    sessions: dict[int, Owned] = {}
    for process in processes:
        owner, _, rest = _environment(process).get(OWNER, "").partition("|")
        if owner == str(directory):
            name, _, digest = rest.partition("|")
            found[process.pid] = Owned(process=process, part=name, digest=digest)
            sessions.setdefault(_session(process.pid), found[process.pid])
    sessions.pop(_session(os.getpid()), None)
    # A process that renames itself (Ray's dashboard modules) overwrites its environment, so its session identifies it.
    for process in processes:
        kin = sessions.get(_session(process.pid)) or found.get(_parent(process))
        if process.pid not in found and kin:
            found[process.pid] = Owned(process=process, part=kin.part, digest=kin.digest)
    return sorted((o for o in found.values() if part in (None, o.part)), key=lambda o: _started(o.process))


def launch(
    argv: Sequence[str], *, environment: Mapping[str, str], log: Path, cwd: Path, tied: bool
) -> subprocess.Popen[bytes]:
    """Start a server in its own session, so that neither Ctrl-C nor a closed terminal reaches it.

    Args:
        tied: the kernel sends the server SIGTERM when this process ends, even if it is killed (Linux only).
    """
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    with log.open("ab") as output:
        output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} start {argv[0]}\n".encode())
        output.flush()
        return subprocess.Popen(
            argv, env=dict(environment), cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, preexec_fn=_end_with_parent if tied else None,
        )  # fmt: skip


def stop(find: Callable[[], list[Owned]], grace: float) -> int:
    """End the processes that `find` returns: SIGTERM to the topmost, `grace` seconds later SIGKILL to the remaining
    ones.

    Returns: how many processes there were. Raises StackError when one survives SIGKILL (it hangs in the kernel).
    """
    first = find()
    pids = {o.process.pid for o in first}
    for item in first:
        if _parent(item.process) not in pids:
            _signal(item.process.terminate)
    if not _gone(find, grace):
        deadline = time.monotonic() + KILL_SECONDS
        while left := find():
            for item in left:
                _signal(item.process.kill)
            _reap(left)
            if time.monotonic() > deadline:
                pids_left = [o.process.pid for o in left]
                raise StackError(f"processes {pids_left} are alive {KILL_SECONDS:.0f} s after SIGKILL; see `ps -l`.")
    return len(first)


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log file since the newest start, for an error message; without a Go server's stack dump."""
    if not log.exists():
        return "(no log)"
    newest = log.read_text(errors="replace").rpartition("\n--- ")[2]
    return "\n".join(newest.partition("\ngoroutine ")[0].splitlines()[-lines:])


def resident(process: psutil.Process) -> int:
    """Resident bytes, 0 for a process that has just ended."""
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def name_of(process: psutil.Process) -> str:
    """Name of the program, empty for a process that has just ended."""
    try:
        return process.name()
    except psutil.Error:
        return ""


def _gone(find: Callable[[], list[Owned]], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while left := find():
        if time.monotonic() > deadline:
            return False
        _reap(left)
        time.sleep(POLL_SECONDS)
    return True


def _reap(items: Iterable[Owned]) -> None:
    """Collect exit codes of our own children, which would otherwise remain as zombies."""
    psutil.wait_procs([o.process for o in items], timeout=0)


def _signal(send: Callable[[], None]) -> None:
    try:
        send()  # psutil compares the start time first: a reused pid is never signalled
    except psutil.NoSuchProcess:
        pass


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return 0


def _started(process: psutil.Process) -> float:
    try:
        return process.create_time()
    except psutil.Error:
        return 0.0


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return -pid  # an id that no session has
