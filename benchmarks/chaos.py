"""Kill a training again and again, at random moments, and compare what it ends with.

    python -m benchmarks.chaos --kills 20 --outages 1 --fault-rate 0.02

A local stack trains a tiny model twice: once in peace, once while workers, reading actors, executors, controllers and
the job's driver are killed at random by SIGKILL, a share of S3's answers are 503 or cut, and S3 cannot be reached for a
minute at a time; a driver that fails is submitted again. At the end weights, moments and averages must be equal bit for
bit, the samples used must be the planned ones, and MLflow must hold every step once.
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
from typing import Any
from urllib.parse import urlsplit

import tyro

from benchmarks.fault_proxy import FaultProxy
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
OUTAGE = "outage"
DRIVER = """
import os, runpy, ray
ray.init(runtime_env={"env_vars": {"AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}})
runpy.run_module("pipelines.finetune", run_name="__main__", alter_sys=True)
"""
"""`python -m pipelines.finetune`, whose workers go by the driver's way to S3, not by that of Ray's head."""


@dataclass(frozen=True, kw_only=True)
class ChaosConfig:
    kills: int = 20
    outages: int = 0
    """Times at which S3 cuts and refuses all connections."""
    outage_seconds: float = 60.0
    fault_rate: float = 0.0
    """Share of S3's answers that are 503; half as many more are cut in their middle."""
    steps: int = 2000
    pause: tuple[float, float] = (15.0, 40.0)
    """Seconds between two of these events, drawn evenly."""
    seed: int = 0
    results: Path | None = None
    """Where to write the figures as JSON."""


class Job:
    """The training's driver, submitted again when it has ended too early."""

    def __init__(self, config: FinetuneConfig, directory: Path, endpoint: str = "") -> None:
        self._file, self.submissions, self._endpoint = directory / f"{config.name}.yaml", 0, endpoint
        self._file.write_text(to_yaml(config))
        self._log = (directory / f"{config.name}.log").open("w")
        self.submit()

    def submit(self) -> None:
        command = [sys.executable, "-c", DRIVER, "--config", str(self._file)]
        environment = {**os.environ, "AWS_ENDPOINT_URL": self._endpoint or os.environ["AWS_ENDPOINT_URL"]}
        self.process = subprocess.Popen(command, env=environment, stdout=self._log, stderr=self._log)
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


def run_troubled(
    config: FinetuneConfig, chaos: ChaosConfig, directory: Path, proxy: FaultProxy
) -> tuple[Job, dict[str, int]]:
    draw, happened = random.Random(chaos.seed), collections.Counter[str]()
    events = draw.choices(list(VICTIMS), k=chaos.kills) + [OUTAGE] * chaos.outages
    draw.shuffle(events)
    job = Job(config, directory, proxy.url)
    while events and not job.done():
        time.sleep(draw.uniform(*chaos.pause))
        if job.process.poll() is not None:
            continue
        if events[-1] == OUTAGE:
            proxy.outage_for(chaos.outage_seconds)
            time.sleep(chaos.outage_seconds)
        elif not kill_one(job, events[-1]):
            continue
        happened[events.pop()] += 1
        print(f"{happened.total()}: {happened}", flush=True)
    job.wait()
    return job, dict(happened)


def main() -> None:
    chaos = tyro.cli(ChaosConfig)
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(directory, tied=True)
        os.environ.update(stack.up().variables)
        try:
            base = str(write_tiny_base(Path(directory) / "base"))
            values: dict[str, Any] = {
                "num_steps": chaos.steps,
                "checkpoint_every": 50,
                "log_every": 4,
                "max_failures": -1,
            }
            peaceful, troubled = (make_config(base, name, **values) for name in ("peaceful", "troubled"))
            began = time.monotonic()
            Job(peaceful, Path(directory)).wait()
            middle = time.monotonic()
            address = urlsplit(os.environ["AWS_ENDPOINT_URL"])
            with FaultProxy(str(address.hostname), int(address.port or 0), seed=chaos.seed) as proxy:
                proxy.error_rate, proxy.reset_rate = chaos.fault_rate, chaos.fault_rate / 2
                job, happened = run_troubled(troubled, chaos, Path(directory), proxy)
            seconds = {"peace": round(middle - began), "trouble": round(time.monotonic() - middle)}
            result = {
                "happened": happened,
                "requests": dict(proxy.counts),
                "submissions": job.submissions,
                "steps": chaos.steps,
                "seconds": seconds,
            }
            assert_same_run(troubled, peaceful)
        finally:
            stack.down()
    print(f"{result}: weights, moments, averages and samples are equal")
    if chaos.results:
        chaos.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
