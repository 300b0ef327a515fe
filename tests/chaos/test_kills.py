"""Whatever is killed while a training runs, it ends with the weights it would have had."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from d2f_core import storage
from d2f_core.train import checkpoint, heartbeat
from infra.local.stack import Stack
from pipelines.cli import to_yaml
from pipelines.finetune import main
from tests.chaos.training import SAVES, Running, assert_same_run, has_checkpoint, make_config, processes, wait_for

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]


def test_a_worker_and_then_the_controller_are_killed(base, unbroken):
    config = make_config(base, "killed-worker")
    with Running(config) as running:
        running.wait_for("a first checkpoint", lambda: has_checkpoint(config.output))
        running.kill_one("ray::RayTrainWorker")
        running.wait_for("the next checkpoint", lambda: has_checkpoint(config.output, 2 * SAVES))
        running.kill_one("ray::TrainController")
    assert_same_run(config, unbroken)


def test_s3_and_mlflow_are_killed_and_come_back_and_then_a_worker_stands_still(
    base, unbroken, stack_directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 6.0)  # far from the time limit, however busy the machine is
    config = make_config(base, "killed-servers", worker_timeout_seconds=30)
    # Without Ray's head: `up` would replace it, and the training with it, if it were too busy to answer.
    servers = Stack(stack_directory, parts=("s3", "mlflow"), tied=True)
    with caplog.at_level(logging.WARNING, logger="d2f_core.train"), Running(config) as running:
        running.wait_for("a first checkpoint", lambda: has_checkpoint(config.output))
        for status in servers.status():
            for pid in status.pids:
                os.kill(pid, signal.SIGKILL)
        servers.up()
        running.wait_for("a checkpoint after that", lambda: has_checkpoint(config.output, 2 * SAVES))
        stopped = processes("ray::RayTrainWorker")[-1]
        os.kill(stopped.pid, signal.SIGSTOP)
    assert f"process {stopped.pid}) was last heard of" in caplog.text, "named before the time limit"
    assert_same_run(config, unbroken)


def test_the_driver_is_killed_and_the_newest_checkpoint_damaged(base, unbroken, tmp_path: Path):
    """The same job again goes on from the checkpoint before."""
    config = make_config(base, "killed-driver")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "pipelines.finetune", "--config", str(file)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for("a checkpoint", lambda: driver.poll() is not None or has_checkpoint(config.output, 2 * SAVES))
        assert driver.poll() is None
    finally:
        driver.kill()
        driver.wait()
    wait_for("the end of its workers", lambda: not processes("ray::RayTrainWorker"))
    newest, before = (checkpoint.list_checkpoints(config.output)[index] for index in (-1, -2))
    assert config.train.num_steps > newest.manifest.step > before.manifest.step
    place = f"{newest.uri}/{next(file.path for file in newest.manifest.files if file.kind == 'exp_avg')}"
    data = bytearray(storage.read_bytes(place))
    data[-3] ^= 1
    storage.write_bytes(place, bytes(data))
    main(config)
    assert_same_run(config, unbroken)
