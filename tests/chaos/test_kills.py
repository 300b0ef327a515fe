"""Whatever is killed while a training runs, it ends with the weights it would have had."""

import logging
from pathlib import Path

import pytest
import ray
from ray.job_submission import JobStatus

from d2f_core import storage
from d2f_core.train import checkpoint
from d2f_core.train.room import usable_resources
from infra.local.ray_head import LOGICAL_CPUS
from pipelines.finetune import main
from tests.chaos.jobs import submitted
from tests.chaos.nodes import second_node
from tests.chaos.training import (
    STEPS,
    Running,
    assert_same_run,
    has_checkpoint,
    make_config,
    off_schedule,
    processes,
    wait_for,
)

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]


@ray.remote
class Placeholder:
    """Holds CPUs, so that others have no room there."""

    def ready(self) -> bool:
        return True


def test_a_node_goes_as_announced_and_then_a_worker_and_the_controller_are_killed(
    base, unbroken, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Three restarts: one does not count, and between the other two is a new checkpoint."""
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    config = make_config(base, "killed-worker", cpus_per_worker=2, max_failures=1)
    placeholder = Placeholder.options(num_cpus=LOGICAL_CPUS - 3).remote()  # room for one worker and two readers
    assert ray.get(placeholder.ready.remote(), timeout=60)
    with (
        second_node(2, tmp_path / "node.log") as node,
        caplog.at_level(logging.WARNING, logger="d2f_core.train"),
        Running(config) as running,
    ):
        # A node that was announced to go takes no new actors, and these start on the workers' own nodes.
        running.wait_for("both readers", lambda: len(processes("ray::SplitCoordinator")) == 2)
        assert len(node.processes("ray::RayTrainWorker")) == 1
        ray.kill(placeholder)
        node.announce()
        running.wait_for("fewer CPUs to count on", lambda: usable_resources()["CPU"] == LOGICAL_CPUS)
        assert ray.cluster_resources()["CPU"] > LOGICAL_CPUS
        running.wait_for("a checkpoint off schedule", lambda: off_schedule(config.output))
        node.kill()
        running.wait_for("a restart", lambda: "for a node was announced to go" in caplog.text)
        assert len(off_schedule(config.output)) == 1, "saved once for the notice"
        running.wait_for_the_next_checkpoint()
        running.kill_one("ray::RayTrainWorker")
        running.wait_for_the_next_checkpoint()
        running.kill_one("ray::TrainController")
    assert_same_run(config, unbroken)


def test_a_job_is_stopped_and_then_its_driver_killed_and_the_newest_checkpoint_damaged(base, unbroken, tmp_path: Path):
    """The same job again goes on: from the step at which it was stopped, and from the checkpoint before."""
    config, file = make_config(base, "killed-driver"), tmp_path / "config.yaml"
    with submitted(config, file, f"--train.checkpoint-every={STEPS}") as job:
        job.wait_for("the first step", lambda: f"training from step 0 to {STEPS} on 2 workers" in job.log)
        job.stop()
        assert job.wait() == JobStatus.STOPPED
        (step,) = off_schedule(config.output)
        assert f"stopped by SIGTERM; step {step} is saved in s3://" in job.log
    assert not storage.exists(f"{config.output}/model/diff2flow.json"), "no export of a training that was stopped"
    wait_for("the end of its workers", lambda: not processes("ray::RayTrainWorker"))
    with submitted(config, file) as job:
        job.wait_for("a checkpoint", lambda: has_checkpoint(config.output, step + 1))
        job.kill_driver()
        assert job.wait() == JobStatus.FAILED
        assert f"resumed from {config.output}/checkpoints/step-{step:08d}" in job.log
    wait_for("the end of its workers", lambda: not processes("ray::RayTrainWorker"))
    newest, before = (checkpoint.list_checkpoints(config.output)[index] for index in (-1, -2))
    assert config.train.num_steps > newest.manifest.step > before.manifest.step
    place = f"{newest.uri}/{next(file.path for file in newest.manifest.files if file.kind == 'exp_avg')}"
    data = bytearray(storage.read_bytes(place))
    data[-3] ^= 1
    storage.write_bytes(place, bytes(data))
    main(config)
    assert_same_run(config, unbroken)
