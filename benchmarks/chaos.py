"""Kill a training again and again, at random moments, and compare what it ends with.

    python -m benchmarks.chaos --kills 20

A local stack trains a tiny model twice: once in peace, once while workers, reading actors, executors, controllers and
the job's driver are killed at random by SIGKILL; the driver is then submitted again. At the end weights, moments and
averages must be equal bit for bit, the samples used must be the planned ones, and MLflow must hold every step once.
"""

import collections
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from infra.local.stack import Stack
from pipelines.cli import to_yaml
from pipelines.configs import FinetuneConfig
from tests.chaos.training import assert_same_run, make_config, processes
from tests.inference.tiny_base import write_tiny_base

VICTIMS = {
    "worker": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
    "reader": "ray::MapWorker(MapBatches(PlanReader",
    "executor": "ray::SplitCoordinator",
    "driver": "",
}


@dataclass(frozen=True, kw_only=True)
class ChaosConfig:
    kills: int = 20
    steps: int = 2000
    pause: tuple[float, float] = (15.0, 40.0)
    """Seconds between two kills, drawn evenly."""
    seed: int = 0
    results: Path | None = None
    """Where to write the figures as JSON."""


class Job:
    """The training's driver, submitted again when it has ended too early."""

    def __init__(self, config: FinetuneConfig, directory: Path) -> None:
        self._file, self.submissions = directory / f"{config.name}.yaml", 0
        self._file.write_text(to_yaml(config))
        self._log = (directory / f"{config.name}.log").open("w")
        self.submit()

    def submit(self) -> None:
        command = [sys.executable, "-m", "pipelines.finetune", "--config", str(self._file)]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self.submissions += 1

    def done(self) -> bool:
        """Whether the training is complete; submits it again when the driver failed."""
        code = self.process.poll()
        if code:
            self.submit()
        return code == 0

    def wait(self) -> None:
        while not self.done():
            time.sleep(1)


def kill_one(job: Job, name: str) -> bool:
    if name == "driver":
        job.process.kill()
        job.process.wait()
        return True
    found = processes(VICTIMS[name])
    if found:
        found[-1].kill()
    return bool(found)


def run_killed(config: FinetuneConfig, chaos: ChaosConfig, directory: Path) -> tuple[Job, dict[str, int]]:
    draw, killed = random.Random(chaos.seed), collections.Counter[str]()
    job = Job(config, directory)
    while killed.total() < chaos.kills and not job.done():
        time.sleep(draw.uniform(*chaos.pause))
        name = draw.choice(list(VICTIMS))
        if job.process.poll() is None and kill_one(job, name):
            killed[name] += 1
            print(f"kill {killed.total()}: {name}", flush=True)
    job.wait()
    return job, dict(killed)


def main() -> None:
    chaos = tyro.cli(ChaosConfig)
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(directory, tied=True)
        os.environ.update(stack.up().variables)
        try:
            base = str(write_tiny_base(Path(directory) / "base"))
            values = {"num_steps": chaos.steps, "checkpoint_every": 50, "log_every": 4, "max_failures": -1}
            peaceful, troubled = (make_config(base, name, **values) for name in ("peaceful", "troubled"))
            began = time.monotonic()
            Job(peaceful, Path(directory)).wait()
            middle = time.monotonic()
            job, killed = run_killed(troubled, chaos, Path(directory))
            result = {
                "killed": killed, "submissions": job.submissions, "steps": chaos.steps,
                "seconds_in_peace": round(middle - began), "seconds_in_trouble": round(time.monotonic() - middle),
            }  # fmt: skip
            assert_same_run(troubled, peaceful)
        finally:
            stack.down()
    print(f"{result}: weights, moments, averages and samples are equal")
    if chaos.results:
        chaos.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
