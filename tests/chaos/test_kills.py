"""Whatever is killed while a training runs, it ends with the weights it would have had."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra.local.stack import Stack
from pipelines.cli import to_yaml
from pipelines.finetune import main
from tests.chaos.training import (
    SAVES,
    Running,
    assert_same_run,
    final,
    has_checkpoint,
    make_config,
    processes,
    wait_for,
)

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]


def kill_one(running: Running, title: str) -> None:
    running.wait_for(f"a process {title}", lambda: processes(title))
    processes(title)[-1].kill()


def test_a_worker_and_then_the_controller_are_killed(base, unbroken):
    config = make_config(base, "killed-worker")
    running = Running(config)
    running.wait_for("a first checkpoint", lambda: has_checkpoint(config.output))
    kill_one(running, "ray::RayTrainWorker")
    running.wait_for("the next checkpoint", lambda: has_checkpoint(config.output, 2 * SAVES))
    kill_one(running, "ray::TrainController")
    running.join()
    assert_same_run(config, unbroken)


def test_a_reader_and_its_executor_are_killed(base, unbroken):
    """As soon as they are there: so few rows are read ahead at once, and their readers end."""
    config = make_config(base, "killed-reader")
    running = Running(config)
    kill_one(running, "ray::MapWorker(MapBatches(PlanReader")
    kill_one(running, "ray::SplitCoordinator")
    running.join()
    assert_same_run(config, unbroken)


def test_s3_and_mlflow_are_killed_and_come_back(base, unbroken, stack_directory):
    config = make_config(base, "killed-servers")
    running = Running(config)
    running.wait_for("a first checkpoint", lambda: has_checkpoint(config.output))
    stack = Stack(stack_directory, tied=True)
    for status in stack.status():
        if status.name in ("s3", "mlflow"):
            for pid in status.pids:
                os.kill(pid, signal.SIGKILL)
    stack.up()
    running.join()
    assert_same_run(config, unbroken)


def test_the_driver_is_killed_and_the_job_submitted_again(base, unbroken, tmp_path: Path):
    config = make_config(base, "killed-driver")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "pipelines.finetune", "--config", str(file)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for("a first checkpoint", lambda: driver.poll() is not None or has_checkpoint(config.output))
        assert driver.poll() is None and final(config.output)[0].manifest.step < config.train.num_steps
    finally:
        driver.kill()
        driver.wait()
    main(config)
    assert_same_run(config, unbroken)
