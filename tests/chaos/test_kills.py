"""Whatever is killed while a training runs, it ends with the weights it would have had."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.job_submission import JobStatus

from benchmarks.fault_proxy import FaultProxy
from d2f_core import storage
from d2f_core.nodes import living_nodes
from d2f_core.train import checkpoint, heartbeat
from infra.local.ray_head import LOGICAL_CPUS
from infra.local.stack import Stack, StackEnv
from tests.chaos.jobs import submitted
from tests.chaos.nodes import Node, second_node
from tests.chaos.training import (
    STEPS,
    Running,
    assert_same_run,
    has_checkpoint,
    make_config,
    newest_step,
    off_schedule,
)
from tests.ray_processes import processes, wait_for
from tests.slow import slow

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]


@ray.remote
class Placeholder:
    """Holds CPUs, so that others have no room there."""

    def ready(self) -> bool:
        return True


def lose_the_node(running: Running, node: Node, placeholder: Any) -> None:
    """A worker and its reader are on it; a checkpoint is made between its notice and its end."""
    # A node that was announced to go takes no new actors, and readers start on the workers' own nodes.
    now = time.time()
    running.wait_for("both readers", lambda: sum(one.create_time() > now for one in processes("ray::BlockReader")) == 2)
    assert len(node.processes("ray::RayTrainWorker")) == 1
    ray.kill(placeholder)
    node.announce()
    running.wait_for(
        "fewer CPUs to count on", lambda: sum(one.total["CPU"] for one in living_nodes()) == LOGICAL_CPUS + 1
    )
    assert ray.cluster_resources()["CPU"] > LOGICAL_CPUS + 1
    running.wait_for("a checkpoint off schedule", lambda: off_schedule(running.config.output))
    node.kill()


@contextlib.contextmanager
def faulty_s3(stack: StackEnv) -> Iterator[FaultProxy]:
    """A way to S3 on which answers are refused and cut."""
    with FaultProxy.before(stack.variables["AWS_ENDPOINT_URL"], seed=1) as proxy:
        proxy.error_rate, proxy.reset_rate = 0.06, 0.03
        yield proxy


@contextlib.contextmanager
def bad_network(stack: StackEnv) -> Iterator[FaultProxy]:
    """Between S3 and all processes that this one starts on the cluster."""
    with faulty_s3(stack) as proxy:
        ray.shutdown()
        ray.init(runtime_env={"env_vars": {"AWS_ENDPOINT_URL": proxy.url}})
        try:
            yield proxy
        finally:
            ray.shutdown()
            ray.init()


def restart_servers(directory: Path) -> None:
    """Kill S3 and MLflow, and start them again; not Ray's head: if it were too busy to answer, it would be replaced."""
    servers = Stack(directory, parts=("s3", "mlflow"), tied=True)
    for status in servers.status():
        for pid in status.pids:
            os.kill(pid, signal.SIGKILL)
    servers.up()


@slow("5 minutes: four of these ends stay in the job below, a notice and a worker that stands still in tests/train")
@pytest.mark.timeout(900)
def test_six_attempts_over_a_bad_network_make_the_same_run(
    base, unbroken, stack: StackEnv, stack_directory: Path, tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch
):
    """What ends the attempts, in this order: a worker killed after a reader, a node that goes as announced, a worker
    killed, the controller killed, a worker that stands still. Between all but the first two is a new checkpoint; those
    count as one, as a node that was announced to go is no failure.

    Throughout, answers of S3 to the cluster's processes are refused, cut and lost; all of it is out for a while; and
    its server is killed, with MLflow's.
    """
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 6.0)  # far from the time limit, however busy the machine is
    config = make_config(base, "six-attempts", cpus_per_worker=2, max_failures=1, worker_timeout_seconds=30)
    with (
        bad_network(stack) as proxy,
        second_node(1, tmp_path / "spare.log"),  # for evaluations: on the others is no room beside the workers
        second_node(2, tmp_path / "node.log") as node,
        caplog.at_level(logging.WARNING, logger="d2f_core.train"),
    ):
        placeholder = Placeholder.options(num_cpus=LOGICAL_CPUS - 2).remote()  # room for one worker
        assert ray.get(placeholder.ready.remote(), timeout=60)
        with Running(config) as running:
            # As soon as it is there: so few rows are read ahead at once, and then their readers end.
            running.kill_one("ray::BlockReader")
            running.kill_one("ray::RayTrainWorker")
            running.wait_for("a restart", lambda: "the attempt ended" in caplog.text)
            lose_the_node(running, node, placeholder)
            running.wait_for("a restart", lambda: "for a node was announced to go" in caplog.text)
            assert len(off_schedule(config.output)) == 1, "saved once for the notice"
            running.wait_for_the_next_checkpoint()
            running.kill_one("ray::RayTrainWorker")
            running.wait_for_the_next_checkpoint()
            running.kill_one("ray::TrainController")
            running.wait_for_the_next_checkpoint()
            proxy.outage_for(5)
            running.wait_for_the_next_checkpoint()
            stopped = processes("ray::RayTrainWorker")[-1]
            os.kill(stopped.pid, signal.SIGSTOP)
            running.wait_for_the_next_checkpoint()
            restart_servers(stack_directory)
    assert_there_were_faults(proxy)
    assert f"process {stopped.pid}) was last heard of" in caplog.text, "named before the time limit"
    assert_same_run(config, unbroken)


def assert_there_were_faults(proxy: FaultProxy) -> None:
    assert proxy.counts["error"] and proxy.counts["reset"] and proxy.counts["refused"]


def damage_the_newest(output: str) -> None:
    newest = checkpoint.list_checkpoints(output)[-1]
    place = f"{newest.uri}/{next(file.path for file in newest.manifest.files if file.kind == 'exp_avg')}"
    data = bytearray(storage.read_bytes(place))
    data[-3] ^= 1
    storage.write_bytes(place, bytes(data))


@pytest.mark.timeout(900)
def test_a_job_over_a_bad_network_makes_the_same_run_whatever_ends_it(
    base, unbroken, stack: StackEnv, stack_directory: Path, tmp_path: Path
):
    """The same job again and again: stopped before its first checkpoint on schedule; a worker killed, and then the
    driver; the newest checkpoint damaged, S3 out for a while, its server and MLflow's killed.

    Throughout, answers of S3 to the job's processes are refused, cut and lost.
    """
    config, file = make_config(base, "ended-jobs", max_failures=1, worker_timeout_seconds=120), tmp_path / "config.yaml"
    output = config.output
    with faulty_s3(stack) as proxy:
        with submitted(config, file, f"--train.checkpoint-every={STEPS}", endpoint=proxy.url) as job:
            job.wait_for("the first step", lambda: f"training from step 0 to {STEPS} on 2 workers" in job.log)
            job.stop()
            assert job.wait() == JobStatus.STOPPED
            (step,) = (one.manifest.step for one in checkpoint.list_checkpoints(output))
            assert f"stopped by SIGTERM; step {step} is saved in s3://" in job.log
        assert not storage.exists(f"{output}/model/diff2flow.json"), "no export of a training that was stopped"
        wait_for("the end of its workers", lambda: not processes("ray::RayTrainWorker"))
        with submitted(config, file, endpoint=proxy.url) as job:
            job.wait_for("a checkpoint", lambda: has_checkpoint(output, step + 1))
            assert f"resumed from {output}/checkpoints/step-{step:08d}" in job.log
            processes("ray::RayTrainWorker")[-1].kill()
            job.wait_for("a restart", lambda: "the attempt ended, failure 1 in a row" in job.log)
            reached = newest_step(output)
            job.wait_for("a checkpoint", lambda: has_checkpoint(output, reached + 1))
            job.kill_driver()
            assert job.wait() == JobStatus.FAILED
        wait_for("the end of its workers", lambda: not processes("ray::RayTrainWorker"))
        damage_the_newest(output)
        damaged = newest_step(output)
        assert step < damaged < config.train.num_steps
        with submitted(config, file, endpoint=proxy.url) as job:
            job.wait_for("a checkpoint", lambda: has_checkpoint(output, damaged + 1))
            assert "is damaged, the one before it is tried" in job.log
            proxy.outage_for(5)
            restart_servers(stack_directory)
            assert job.wait() == JobStatus.SUCCEEDED, job.log
    assert_there_were_faults(proxy)
    assert_same_run(config, unbroken)
