"""A cluster on this machine that grows: a head without CPUs, and nodes of several kinds that Ray's autoscaler starts.

The nodes are raylets with made-up resources. Their provider is given to the autoscaler as `type: external`, and starts
each a while after it was asked for. Ray's own fake provider joins port 6379 only, and its test cluster ends every Ray
on the machine.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS, TAG_RAY_USER_NODE_TYPE

from infra.local import processes
from infra.local.part import Part, past_proxies
from infra.local.ports import choose
from infra.local.processes import POLL_SECONDS
from infra.local.ray_head import ray_part, ray_variables
from infra.local.state import State, load_state, save_state
from tests.ray_internals import node_command

ROOT = Path(__file__).parents[1]
HEAD = "head"
ADDRESS, LOGS, CLOSED = "FAKE_CLUSTER_ADDRESS", "FAKE_CLUSTER_LOGS", "FAKE_CLUSTER_CLOSED"
"""What the provider, in the autoscaler's process, finds in its environment."""
OBJECT_STORE_BYTES = 100_000_000
END_SECONDS = 20.0
GRACE_SECONDS = 3.0
"""For raylets that are told to end; they wait for what runs on them."""


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """What each of its nodes offers, how many there may be, and how long one takes to come."""

    resources: Mapping[str, float]
    least: int = 0
    most: int
    delay: float = 0.0
    """Seconds from the autoscaler's call to the start of the raylet, which takes some more."""


class LocalNodes(NodeProvider):
    """Starts and ends local raylets; lives in the autoscaler's process on the head."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        head_tags = {TAG_RAY_NODE_KIND: "head", TAG_RAY_USER_NODE_TYPE: HEAD, TAG_RAY_NODE_STATUS: "up-to-date"}
        self._tags: dict[str, dict[str, str]] = {HEAD: head_tags}
        self._started: dict[str, psutil.Popen] = {}
        self._numbers, self._lock = itertools.count(1), threading.Lock()

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self._lock:
            ended = [name for name, process in self._started.items() if process.poll() is not None]
            for name in ended:
                del self._started[name], self._tags[name]
            return [name for name, tags in self._tags.items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        return node_id in self._tags

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self._tags

    def node_tags(self, node_id: str) -> dict[str, str]:
        return self._tags[node_id]

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self._tags[node_id].update(tags)

    def external_ip(self, node_id: str) -> str:
        return node_id

    def internal_ip(self, node_id: str) -> str:
        return node_id

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        for _ in range(count):
            with self._lock:
                name = f"{tags[TAG_RAY_USER_NODE_TYPE]}-{next(self._numbers)}"
                self._tags[name] = {**tags, TAG_RAY_NODE_STATUS: "up-to-date"}
                self._started[name] = _start_raylet(name, tags[TAG_RAY_USER_NODE_TYPE], node_config["delay"], resources)

    def terminate_node(self, node_id: str) -> None:
        with self._lock:
            process = self._started.pop(node_id)
            del self._tags[node_id]
        kill_tree(process)


def kill_tree(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait(END_SECONDS)


def _start_raylet(name: str, kind: str, delay: float, resources: Mapping[str, float]) -> psutil.Popen:
    others = {key: amount for key, amount in resources.items() if key not in ("CPU", "GPU", "memory")}
    memory = [f"--memory={resources['memory']:.0f}"] if "memory" in resources else []
    place, log = Path(os.environ["RAY_TMPDIR"], name), Path(os.environ[LOGS], f"{name}.log")
    argv = node_command(
        "--block", f"--address={os.environ[ADDRESS]}", "--node-ip-address=127.0.0.1",
        f"--num-cpus={resources.get('CPU', 0):g}", f"--num-gpus={resources.get('GPU', 0):g}",
        f"--resources={json.dumps(others)}", f"--object-store-memory={OBJECT_STORE_BYTES}", "--min-worker-port=0",
        "--max-worker-port=0", "--dashboard-agent-listen-port=0", "--disable-usage-stats", *memory,
        place=str(place), delay=delay, closed=os.environ[CLOSED],
    )  # fmt: skip
    environment = {
        **os.environ,
        "RAY_CLOUD_INSTANCE_ID": name,
        "RAY_NODE_TYPE_NAME": kind,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    }
    with log.open("wb") as output:
        return psutil.Popen(argv, env=environment, stdout=output, stderr=subprocess.STDOUT)


@dataclass
class FakeCluster:
    """Its head runs from `start` to `end`; programs reach it by `environment`."""

    directory: Path
    kinds: Mapping[str, NodeKind]
    idle_minutes: float = 10.0
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of its nodes and of programs that reach it, such as those of other servers."""
    environment: dict[str, str] = field(init=False, default_factory=dict)

    def start(self) -> None:
        """Raises StackError when the head does not answer in its time."""
        self.directory.mkdir(mode=0o700, parents=True)
        (self.directory / "logs").mkdir()
        state = dataclasses.replace(load_state(self.directory), ports=choose({}))
        ours = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        self.environment = {**ray_variables(state), **past_proxies(), **ours, **self.variables}
        save_state(state, self.environment)
        self._part = part = self._head_part(state)
        part.before_start()
        environment = {**part.environment(), **processes.mark(self.directory, "ray", part.digest)}
        log = self.directory / "logs" / "ray.log"
        head = processes.launch(part.argv, environment=environment, log=log, cwd=ROOT, tied=True)
        deadline = time.monotonic() + part.start_seconds
        while problem := part.problem():
            if head.poll() is not None or time.monotonic() > deadline:
                raise processes.StackError(f"the head did not start: {problem}\n{processes.tail(log)}")
            time.sleep(POLL_SECONDS)

    def _head_part(self, state: State) -> Part:
        config = self.directory / "autoscaler.json"
        config.write_text(json.dumps(_autoscaler_config(self.kinds, self.idle_minutes)))
        part = ray_part(state, self.environment)
        argv = [word for word in part.argv if not word.startswith("--num-cpus")]
        variables = {
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_NODE_TYPE_NAME": HEAD,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            ADDRESS: self.environment["RAY_ADDRESS"],
            LOGS: str(self.directory / "logs"),
            CLOSED: str(self._closed),
        }
        return dataclasses.replace(
            part,
            argv=(*argv, "--num-cpus=0", "--num-gpus=0", f"--autoscaling-config={config}"),
            variables={**part.variables, **variables},
        )

    @property
    def _closed(self) -> Path:
        return self.directory / "no-nodes"

    @contextlib.contextmanager
    def no_nodes(self) -> Iterator[None]:
        """The provider has none: those that are asked for come when the context ends."""
        self._closed.touch()
        try:
            yield
        finally:
            self._closed.unlink()

    def nodes(self, kind: str) -> list[psutil.Process]:
        """`ray start` of each node of the kind; all of a node's processes descend from it."""
        found = []
        for one in processes.owned(self.directory):
            with contextlib.suppress(psutil.NoSuchProcess):
                if f"/{kind}-" in " ".join(one.process.cmdline()[:4]):  # the names of its sockets
                    found.append(one.process)
        return found

    def kill(self) -> None:
        """Kill all of it at once, as when the head's machine dies and takes its nodes along."""
        for one in processes.owned(self.directory):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.process.kill()

    def end(self) -> None:
        """End the head and all nodes: the processes that carry the mark of this directory, and no others."""
        processes.stop(lambda: processes.owned(self.directory), GRACE_SECONDS)
        self._part.after_stop()

    @contextlib.contextmanager
    def job(self, *arguments: object, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """One of `tests.waiting_jobs` as a driver of its own; killed when the context ends before it does."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        argv = [sys.executable, "-m", "tests.waiting_jobs", *map(str, arguments)]
        with log.open("wb") as output:
            process = psutil.Popen(
                argv, env={**environment, **self.environment}, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            yield process
        finally:
            kill_tree(process)


def _autoscaler_config(kinds: Mapping[str, NodeKind], idle_minutes: float) -> dict[str, Any]:
    head = {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0}
    types = {
        name: {
            "resources": dict(kind.resources),
            "node_config": {"delay": kind.delay},
            "min_workers": kind.least,
            "max_workers": kind.most,
        }
        for name, kind in kinds.items()
    }
    mappings = ("file_mounts", "docker", "auth")
    lists = (
        "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
        "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
    )  # fmt: skip
    return {
        **{name: {} for name in mappings},
        **{name: [] for name in lists},
        "cluster_name": "fake",
        "max_workers": sum(kind.most for kind in kinds.values()),
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": idle_minutes,
        "provider": {
            "type": "external",
            "module": f"{__name__}.LocalNodes",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {HEAD: head, **types},
        "head_node_type": HEAD,
    }
