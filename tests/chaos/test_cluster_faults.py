"""Twenty seeded faults on a cluster that grows: nodes, their provider, S3, credentials, memory and the head.

A training of two workers with a made-up GPU each meets one after the other, a new checkpoint between any two of them,
and ends with the bits of one that met none. When the head dies all of its jobs do, for Ray keeps its tables in the
head's memory (an external Redis would keep them); the same command goes on, on another cluster.
"""

import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.fault_proxy import FaultProxy
from d2f_core import storage
from pipelines.cli import to_yaml
from pipelines.configs import FinetuneConfig
from tests.chaos.training import assert_same_run, has_checkpoint, make_config, newest_step, wait_for
from tests.fake_cluster import ROOT, FakeCluster, NodeKind, kill_tree
from tests.flow.tiny_base import write_tiny_base
from tests.own_servers import own_servers
from tests.slow import slow

pytestmark = [pytest.mark.starts_cluster, pytest.mark.timeout(3600)]
SEED, FAULTS, STEPS = 20, 20, 1000
BASE = "s3://d2f/test-chaos/base"
KINDS = {
    "gpu": NodeKind(resources={"CPU": 3, "GPU": 1}, most=3, delay=1),
    "cpu": NodeKind(resources={"CPU": 4}, most=1, delay=1),
}
logger = logging.getLogger(__name__)


class Run:
    """A training on the newest of its clusters, through a proxy before S3."""

    def __init__(self, config: FinetuneConfig, place: Path, proxy: FaultProxy) -> None:
        self.config, self.place, self.proxy = config, place, proxy
        self.clusters: list[FakeCluster] = []
        (place / "config.yaml").write_text(to_yaml(config))

    @property
    def cluster(self) -> FakeCluster:
        return self.clusters[-1]

    @property
    def log(self) -> str:
        return "".join(file.read_text() for file in sorted(self.place.glob("*.log")))

    def begin(self) -> None:
        """On a new cluster, which has its head alone: the driver joins it."""
        made_up = os.pathsep.join([str(ROOT / "tests/made_up_gpus"), str(ROOT)])
        variables = {
            **{key: value for key, value in os.environ.items() if key.startswith(("AWS_", "MLFLOW_"))},
            "AWS_ENDPOINT_URL": self.proxy.url,
            "PYTHONPATH": made_up,
        }
        number = len(self.clusters)
        self.clusters.append(FakeCluster(self.place / f"cluster-{number}", KINDS, variables=variables))
        self.cluster.start()
        argv = [sys.executable, "-m", "pipelines.finetune", "--config", str(self.place / "config.yaml")]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        with (self.place / f"driver-{number}.log").open("wb") as output:
            self.driver = psutil.Popen(
                argv, env={**environment, **self.cluster.environment}, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )

    def wait_for(self, what: str, condition: Callable[[], object]) -> None:
        wait_for(what, lambda: self.driver.poll() is not None or condition(), 400)
        assert self.driver.poll() is None, f"it ended with {self.driver.poll()} before {what}:\n{self.log[-6000:]}"

    def wait_for_a_checkpoint(self) -> None:
        step = newest_step(self.config.output)
        self.wait_for(f"a checkpoint after step {step}", lambda: has_checkpoint(self.config.output, step + 1))

    def workers(self) -> list[psutil.Process]:
        found = []
        for node in self.cluster.nodes("gpu"):
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [one for one in node.children(recursive=True) if title(one).startswith("ray::RayTrainWorker")]
        return found

    def end(self) -> None:
        kill_tree(self.driver)
        for cluster in self.clusters:
            cluster.end()


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def lose_a_node(run: Run, draw: random.Random) -> None:
    kill_tree(draw.choice(run.cluster.nodes("gpu")))


def lose_a_node_while_the_provider_has_none(run: Run, draw: random.Random) -> None:
    with run.cluster.no_nodes():
        for node in run.cluster.nodes("gpu"):
            kill_tree(node)
        time.sleep(draw.uniform(20, 60))


def lose_s3_at_a_restart(run: Run, draw: random.Random) -> None:
    restarts = run.log.count("Starting again")
    draw.choice(run.workers()).kill()
    run.wait_for("a restart", lambda: run.log.count("Starting again") > restarts)
    run.proxy.outage_for(draw.uniform(5, 15))


def let_credentials_expire(run: Run, draw: random.Random) -> None:
    run.proxy.expired_for(draw.uniform(5, 30))


def let_credentials_expire_at_a_restart(run: Run, draw: random.Random) -> None:
    draw.choice(run.workers()).kill()
    run.proxy.expired_for(draw.uniform(5, 30))


def run_out_of_memory(run: Run, draw: random.Random) -> None:
    """The kernel's answer: SIGKILL to the largest process, a worker."""
    max(run.workers(), key=lambda one: one.memory_info().rss).send_signal(signal.SIGKILL)


def lose_the_readers_node(run: Run, draw: random.Random) -> None:
    kill_tree(draw.choice(run.cluster.nodes("cpu") or run.cluster.nodes("gpu")))


def lose_the_head(run: Run, draw: random.Random) -> None:
    run.cluster.kill()
    run.driver.wait(120)
    run.begin()


KNOWN = (
    lose_a_node, lose_a_node_while_the_provider_has_none, lose_s3_at_a_restart, let_credentials_expire,
    let_credentials_expire_at_a_restart, run_out_of_memory, lose_the_readers_node, lose_the_head,
)  # fmt: skip


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """S3 and MLflow, and a tiny base model on S3."""
    with own_servers(tmp_path_factory.mktemp("servers")):
        storage.upload_tree(write_tiny_base(tmp_path_factory.mktemp("base")), BASE)
        yield BASE


@pytest.fixture
def proxy(servers: str) -> Iterator[FaultProxy]:
    del servers
    with FaultProxy.before(os.environ["AWS_ENDPOINT_URL"], seed=SEED) as proxy:
        yield proxy


def trained(config: FinetuneConfig, place: Path, proxy: FaultProxy, faults: list[Callable[..., None]]) -> str:
    """What the training that met the faults printed."""
    draw, run = random.Random(SEED), Run(config, place, proxy)
    try:
        run.begin()
        for number, fault in enumerate(faults):
            run.wait_for_a_checkpoint()
            print(f"fault {number} at step {newest_step(config.output)}: {fault.__name__}", flush=True)
            fault(run, draw)
        assert run.driver.wait(900) == 0, run.log[-6000:]
        return run.log
    finally:
        run.end()


@slow("20 minutes; single ones of these faults stay in the tests of this folder and of waiting for nodes")
def test_a_training_ends_with_the_same_bits_whatever_its_cluster_does(
    servers: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    options = {
        "num_steps": STEPS, "checkpoint_every": 10, "log_every": 4, "use_gpu": True, "max_failures": 3,
        "worker_timeout_seconds": 60, "node_wait_seconds": 120,
    }  # fmt: skip
    configs = [make_config(servers, f"cluster-{name}", **options) for name in ("faults", "unbroken")]
    order = [KNOWN[number % len(KNOWN)] for number in range(FAULTS)]
    random.Random(SEED).shuffle(order)
    logs = []
    for config, faults in zip(configs, (order, []), strict=True):
        (place := tmp_path / config.name).mkdir()
        logs.append(trained(config, place, proxy, list(faults)))
    assert logs[0].count("Starting again") >= 8 and "Starting again" not in logs[1]
    assert proxy.counts["expired"] and proxy.counts["refused"]
    assert storage.exists(f"{configs[0].output}/model/diff2flow.json")
    assert_same_run(*configs)
