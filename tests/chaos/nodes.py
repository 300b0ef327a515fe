"""A second Ray node on this machine, that is announced to go and then goes, as a spot instance does."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from tests.chaos.training import wait_for

RAY_START = """
from ray._private import services
from ray.scripts.scripts import main
services.resolve_ip_for_localhost = lambda host: host
main()
"""
"""`ray start`, which would look for a head on 127.0.0.1 at this machine's outer address."""


@dataclass
class Node:
    id: str
    address: str
    """Of the cluster."""
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

    def announce(self, seconds: int) -> None:
        """The notice: in so many seconds the node will be gone."""
        accepted, reason = GcsClient(address=self.address).drain_node(
            self.id, DRAIN_NODE_REASON_PREEMPTION, "a test's notice", int((time.time() + seconds) * 1000)
        )
        assert accepted, reason

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*self.process.children(recursive=True), self.process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait(30)


@contextlib.contextmanager
def second_node(num_cpus: int, log: Path) -> Iterator[Node]:
    """Joined to the cluster that this process is connected to: connect first, or the driver may choose this node."""
    before, address = {node["NodeID"] for node in ray.nodes()}, os.environ["RAY_ADDRESS"]
    argv = [
        sys.executable, "-c", RAY_START, "start", "--block", f"--address={address}", "--node-ip-address=127.0.0.1",
        f"--num-cpus={num_cpus}", "--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0",
        "--dashboard-agent-listen-port=0", "--disable-usage-stats",
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    with log.open("w") as file:
        started = psutil.Popen(argv, env=environment, stdout=file, stderr=subprocess.STDOUT)
    node = Node("", address, started)
    try:

        def joined() -> list[str]:
            assert started.poll() is None, log.read_text()
            return [one["NodeID"] for one in ray.nodes() if one["Alive"] and one["NodeID"] not in before]

        wait_for("a second node", joined, 60)
        node.id = joined()[0]
        yield node
    finally:
        node.kill()
