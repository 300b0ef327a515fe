"""The whole stack: start it from any state, report its status, stop it. Data stay on disk."""

import contextlib
import dataclasses
import fcntl
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.local import processes
from infra.local.mlflow_server import mlflow_part, mlflow_variables
from infra.local.part import Part, past_proxies
from infra.local.ports import choose, wait_until_free
from infra.local.processes import StackError
from infra.local.ray_head import ray_part, ray_variables
from infra.local.seaweed import s3_part, s3_variables
from infra.local.state import State, load_state, save_state

PARTS = ("s3", "mlflow", "ray")
LOCK_SECONDS = 600.0
PATIENCE_SECONDS = 30.0
"""Seconds that a live server may fail to answer (the machine may be busy training) before it is replaced."""


@dataclass(frozen=True, kw_only=True)
class StackEnv:
    """Environment variables by which programs find the stack, and its addresses."""

    directory: Path
    variables: Mapping[str, str]
    started: tuple[str, ...]
    """Parts that this call started; empty when everything was running."""


@dataclass(frozen=True, kw_only=True)
class PartStatus:
    name: str
    state: str
    """`running`, `stopped`, or what is wrong."""
    pids: tuple[int, ...]
    memory: int
    """Resident bytes of all the part's processes; shared pages are counted in each."""
    address: str
    log: Path


class Stack:
    """The servers of one directory; stacks with different directories can run in parallel."""

    def __init__(
        self,
        directory: Path | str,
        *,
        parts: Sequence[str] = PARTS,
        tied: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ):
        """
        Args:
            directory: where state, data and logs are kept.
            parts: the servers to run, out of `PARTS`.
            tied: servers end when this process ends; for tests.
            say: receives a line of progress for each server that was started.
        """
        unknown = set(parts) - set(PARTS)
        if unknown or ("mlflow" in parts and "s3" not in parts):
            raise StackError(f"parts={tuple(parts)}: choose from {PARTS}; mlflow keeps its artifacts in s3.")
        self.directory = Path(directory).expanduser().resolve()
        self.names = tuple(name for name in PARTS if name in parts)
        self._tied = tied
        self._say = say
        self._children: list[subprocess.Popen[bytes]] = []

    def up(self) -> StackEnv:
        """Start servers that do not run, replace broken or outdated ones, and keep the rest.

        Raises:
            StackError: a fixed port is taken, or a server does not answer within its time (with its log's end).
        """
        with self._locked():
            state = load_state(self.directory)
            well = self._well(state)
            for name in PARTS:
                if name not in well and name in self.names:
                    self._stop(name, state)
            staying = {*well, *(name for name in PARTS if name not in self.names and self._owned(name))}
            kept = [port for port in state.ports if port.split("_")[0] in staying]
            wait_until_free(number for name, number in state.ports.items() if name not in kept)
            ports = choose(state.ports, busy_is_ours=kept)
            state = dataclasses.replace(state, ports=ports)
            parts = self._parts(state)
            # A server started with ports or credentials other than the current ones is replaced too.
            outdated = [n for n in well if any(o.digest != parts[n].digest for o in self._owned(n))]
            for name in outdated:
                self._stop(name, state)
            # The environment also names running servers of this directory that were not requested, so that they can be
            # found.
            variables = {**self._variables(state, {*self.names, *staying}), **past_proxies()}
            save_state(state, variables)
            started = tuple(n for n in self.names if n not in well or n in outdated)
            self._start([parts[name] for name in started], state)
            return StackEnv(directory=self.directory, variables=variables, started=started)

    def down(self) -> int:
        """Stop every process of this stack, after asking jobs to end; returns the number of processes."""
        if not self.directory.is_dir():  # deleted under the running servers
            return self._kill(self._owned, 10.0)
        with self._locked():
            state = load_state(self.directory)
            stopped = sum(self._stop(name, state) for name in reversed(PARTS))
            return stopped + self._kill(self._owned, 5.0)

    def status(self) -> list[PartStatus]:
        """The status of each server, from a request to it."""
        state = load_state(self.directory)
        return [self._status(name, state) for name in self.names]

    def _parts(self, state: State) -> dict[str, Part]:
        makers: dict[str, Callable[[], Part]] = {
            "s3": lambda: s3_part(state),
            "mlflow": lambda: mlflow_part(state),
            "ray": lambda: ray_part(state, self._variables(state, self.names)),
        }
        return {name: makers[name]() for name in self.names}

    def _variables(self, state: State, names: Collection[str]) -> dict[str, str]:
        makers = {"s3": s3_variables, "mlflow": mlflow_variables, "ray": ray_variables}
        return {k: v for name in PARTS if name in names for k, v in makers[name](state).items()}

    def _owned(self, name: str | None = None) -> list[processes.Owned]:
        return processes.owned(self.directory, name)

    def _well(self, state: State) -> list[str]:
        """Names of the parts whose processes are alive and answer."""
        live = [name for name in self.names if state.ports and any(o.leads for o in self._owned(name))]
        parts = self._parts(state) if live else {}
        return [name for name in live if self._wait(parts[name], PATIENCE_SECONDS) is None]

    def _wait(self, part: Part, seconds: float) -> str | None:
        """Poll a part until it answers, its processes are gone, or time is up; returns None when it answers, else the
        problem.
        """
        deadline = time.monotonic() + seconds
        while problem := part.problem():
            for child in self._children:
                child.poll()
            if not self._owned(part.name):
                return f"its process ended ({problem})"
            if time.monotonic() > deadline:
                return f"no right answer within {seconds:.0f} s ({problem})"
            time.sleep(processes.POLL_SECONDS)
        return None

    def _start(self, parts: Sequence[Part], state: State) -> None:
        begun = time.monotonic()
        try:
            for part in parts:
                part.before_start()
                environment = {**part.environment(), **processes.mark(self.directory, part.name, part.digest)}
                log = self._log(part.name)
                launched = processes.launch(
                    part.argv, environment=environment, log=log, cwd=self.directory, tied=self._tied
                )
                self._children.append(launched)
            for part in parts:
                problem = self._wait(part, part.start_seconds)
                if problem:
                    log = self._log(part.name)
                    raise StackError(
                        f"{part.name} did not start at {part.address}: {problem}. The end of {log}:\n"
                        f"{processes.tail(log)}"
                    )
                self._say(f"{part.name:8} ready after {time.monotonic() - begun:4.1f} s   {part.address}")
        except BaseException:  # Ctrl-C included: leave nothing half-started behind
            for part in parts:
                self._stop(part.name, state)
            raise

    def _stop(self, name: str, state: State) -> int:
        """End one part's processes, left-over ones included, and clean up after it."""
        if name not in self.names or not state.ports:
            return self._kill(lambda: self._owned(name), 10.0)
        part = self._parts(state)[name]
        if self._owned(name):
            part.before_stop()
        stopped = self._kill(lambda: self._owned(name), part.stop_seconds)
        part.after_stop()
        return stopped

    def _kill(self, find: Callable[[], list[processes.Owned]], grace: float) -> int:
        stopped = processes.stop(find, grace)
        self._children = [child for child in self._children if child.poll() is None]
        return stopped

    def _status(self, name: str, state: State) -> PartStatus:
        live, log = self._owned(name), self._log(name)
        if not live or not state.ports:
            return PartStatus(name=name, state="stopped", pids=(), memory=0, address="-", log=log)
        part = self._parts(state)[name]
        return PartStatus(
            name=name,
            state=part.problem() or "running",
            pids=tuple(o.process.pid for o in live),
            memory=sum(processes.resident(o.process) for o in live),
            address=part.address,
            log=log,
        )

    def _log(self, name: str) -> Path:
        return self.directory / "logs" / f"{name}.log"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock that allows one `up` or `down` at a time; it is released when its process ends."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        (self.directory / "logs").mkdir(exist_ok=True)
        with (self.directory / "lock").open("w") as file:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StackError(
                            f"another `up` or `down` has held {self.directory / 'lock'} for {LOCK_SECONDS:.0f} s. "
                            "One may run at a time: end that command, then try again."
                        ) from None
                    time.sleep(processes.POLL_SECONDS)
            yield
