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
from tests.chaos.training import Running, assert_same_run, final, has_checkpoint, make_config, processes, wait_for

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(
    ("name", "title", "trained"),
    [
        ("worker", "ray::RayTrainWorker", True),
        ("controller", "ray::TrainController", True),
        # So few rows are read ahead at once, and their readers end: these two are killed as soon as they are there.
        ("reader", "ray::MapWorker(MapBatches(PlanReader", False),
        ("reader-executor", "ray::SplitCoordinator", False),
    ],
)
def test_a_process_of_the_cluster_is_killed(base, unbroken, name, title, trained):
    config = make_config(base, f"killed-{name}")
    running = Running(config)
    if trained:
        running.wait_for("a first checkpoint", lambda: has_checkpoint(config.output))
    running.wait_for(f"a process {title}", lambda: processes(title))
    processes(title)[-1].kill()
    running.join()
    assert_same_run(config, unbroken)


@pytest.mark.parametrize("part", ["s3", "mlflow"])
def test_a_server_is_killed_and_comes_back(base, unbroken, part, stack_directory):
    config = make_config(base, f"killed-{part}")
    running = Running(config)
    running.wait_for("a first checkpoint", lambda: has_checkpoint(config.output))
    stack = Stack(stack_directory, tied=True)
    (status,) = (status for status in stack.status() if status.name == part)
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
