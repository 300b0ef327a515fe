"""A second Ray node on this machine, that is announced to go and then goes, as a spot instance does."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

from tests.ray_internals import node_command
from tests.ray_processes import wait_for

ROOT = Path(__file__).parents[2]


@dataclass
class Node:
    process: psutil.Process
    """`ray start`; all of the node's processes descend from it."""

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Those whose title, which Ray gives them, begins so."""
        found = []
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found

    def announce(self) -> None:
        """The notice, as Kubernetes gives it to a pod: Ray then drains the node, as for a spot instance."""
        self.process.terminate()

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*self.process.children(recursive=True), self.process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait(30)


@contextlib.contextmanager
def second_node(num_cpus: int, log: Path, *, seconds: int = 120) -> Iterator[Node]:
    """Joined to the cluster that this process is connected to: connect first, or the driver may choose this node.

    Args:
        seconds: how long the node stays once it is announced to go.
    """
    before = {node["NodeID"] for node in ray.nodes()}
    argv = node_command(
        "--block", f"--address={os.environ['RAY_ADDRESS']}", "--node-ip-address=127.0.0.1", f"--num-cpus={num_cpus}",
        "--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0",
        "--dashboard-agent-listen-port=0", "--disable-usage-stats",
    )  # fmt: skip
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(seconds),
    }
    with log.open("w") as file:
        node = Node(psutil.Popen(argv, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT))

    def joined() -> bool:
        assert node.process.is_running() and node.process.status() != psutil.STATUS_ZOMBIE, log.read_text()
        return any(one["Alive"] and one["NodeID"] not in before for one in ray.nodes())

    try:
        wait_for("a second node", joined, 60)
        yield node
    finally:
        node.kill()
