"""Kill a training again and again, at random moments, and compare what it ends with.

    python -m benchmarks.chaos --kills 20 --outages 1 --fault-rate 0.02
    python -m benchmarks.chaos --training distill --kills 10 --steps 2000

A local stack trains a tiny model twice: once in peace, once while workers, reading actors, controllers and
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
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.fault_proxy import FaultProxy
from d2f_core.correspondence.config import MatcherConfig, MultiViewConfig, StudentConfig
from d2f_core.data.manifest import manifest_exists
from d2f_core.train.config import EmaConfig, TrainConfig
from infra.local.stack import Stack
from pipelines.cli import to_yaml
from pipelines.configs import FinetuneConfig
from pipelines.distill_config import DistillConfig
from tests.chaos.training import Training, assert_same_end, assert_same_run, make_config, newest_step
from tests.correspondence.features import write_features
from tests.correspondence.tiny_transformers import write as write_student
from tests.flow.tiny_base import write_tiny_base
from tests.ray_processes import processes

VICTIMS = {
    "worker": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
    "reader": "ray::BlockReader",
    "driver": "",
}
OUTAGE, READER = "outage", "reader"
LOOK_SECONDS, STALL_SECONDS = 0.2, 10.0
FRUITLESS = 5
"""Submissions one after another without a new checkpoint, after which the job is given up."""
DRIVER = """
import os, runpy, ray
ray.init(runtime_env={"env_vars": {"AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}})
runpy.run_module("pipelines.{job}", run_name="__main__", alter_sys=True)
"""
"""`python -m pipelines.finetune`, or another job, whose workers go by the driver's way to S3, not by that of Ray's
head."""


@dataclass(frozen=True, kw_only=True)
class ChaosConfig:
    training: Literal["finetune", "distill"] = "finetune"
    """`distill`: a student that learns from teachers and views at once, with dropout."""
    kills: int = 20
    """As many of each kind of process, in an order that is drawn."""
    outages: int = 0
    """Times at which S3 cuts and refuses all connections."""
    outage_seconds: float = 60.0
    fault_rate: float = 0.0
    """Share of S3's answers that are 503; half as many more are cut in their middle."""
    stall_rate: float = 0.0
    """Share of S3's answers that wait for 10 s first."""
    steps: int = 2000
    pause: tuple[float, float] = (15.0, 40.0)
    """Seconds between two of these events, drawn evenly."""
    seed: int = 0
    results: Path | None = None
    """Where to write the figures as JSON."""
    logs: Path | None = None
    """Directory for the drivers' output; by default a temporary one that stays when something was wrong."""


class Job:
    """The training's driver, submitted again when it has ended too early."""

    def __init__(self, config: Training, logs: Path, endpoint: str = "") -> None:
        self._config, self._endpoint = config, endpoint
        self.submissions, self._newest, self._fruitless = 0, -1, 0
        self._file = logs / f"{config.name}.yaml"
        self._file.write_text(to_yaml(config))
        self.log = logs / f"{config.name}.log"
        self.submit()

    def submit(self) -> None:
        """Raises SystemExit when the last few submissions brought no new checkpoint: no kill explains that."""
        newest = newest_step(self._config.output) if self.submissions else 0
        self._fruitless = self._fruitless + 1 if newest <= self._newest else 0
        self._newest = max(newest, self._newest)
        if self._fruitless >= FRUITLESS:
            raise SystemExit(
                f"{FRUITLESS} submissions ended before a new checkpoint. The end of {self.log}:\n{self.tail()}"
            )
        job = "distill" if isinstance(self._config, DistillConfig) else "finetune"
        command = [sys.executable, "-c", DRIVER.replace("{job}", job), "--config", str(self._file)]
        environment = {**os.environ, "AWS_ENDPOINT_URL": self._endpoint or os.environ["AWS_ENDPOINT_URL"]}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.submissions += 1

    def tail(self) -> str:
        return self.log.read_text()[-3000:]

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


def happens(job: Job, event: str, chaos: ChaosConfig, proxy: FaultProxy) -> bool:
    """Do it now; False when there is nobody to kill."""
    if event != OUTAGE:
        return kill_one(job, event)
    proxy.outage_for(chaos.outage_seconds)
    time.sleep(chaos.outage_seconds)
    return True


def make_distillation(directory: Path, name: str, **train: Any) -> DistillConfig:
    """A tiny student and the features of tiny teachers, from the tests."""
    features = "s3://d2f/test-chaos/features"
    if not manifest_exists(features):
        write_features(features)
        write_student(directory, "dinov2")
    student = StudentConfig(base=str(directory), dropout=0.1)
    return DistillConfig(
        matcher=MatcherConfig(student=student, multi_view=MultiViewConfig(weight=1.0)), features=features,
        bucket="things", output=f"s3://d2f/test-chaos/{name}", experiment="test-chaos", name=name,
        train=TrainConfig(
            global_batch_size=8, micro_batch_size=4, num_workers=2, threads_per_worker=1, learning_rate=1e-2,
            ema=EmaConfig(decay=0.9), evaluate_every=0, lanes=2, window_rows=4, **train,
        ),
    )  # fmt: skip


def run_troubled(config: Training, chaos: ChaosConfig, logs: Path, proxy: FaultProxy) -> tuple[Job, dict[str, int]]:
    draw, happened = random.Random(chaos.seed), collections.Counter[str]()
    events = [*islice(cycle(VICTIMS), chaos.kills), *[OUTAGE] * chaos.outages]
    draw.shuffle(events)
    job = Job(config, logs, proxy.url)
    due = time.monotonic() + draw.uniform(*chaos.pause)
    while events and not job.done():
        time.sleep(LOOK_SECONDS)
        # A reader lives for seconds after each start only: it is killed when one is seen, whatever is next otherwise.
        reader = READER in events and kill_one(job, READER)
        if reader:
            event = READER
        elif time.monotonic() >= due and job.process.poll() is None:
            event = next((one for one in events if one != READER and happens(job, one, chaos, proxy)), "")
        else:
            event = ""
        if event:
            events.remove(event)
            happened[event] += 1
            due = time.monotonic() + draw.uniform(*chaos.pause)
            print(f"{happened.total()}: {dict(happened)}", flush=True)
    job.wait()
    return job, dict(happened)


def main() -> None:
    chaos = tyro.cli(ChaosConfig)
    logs = chaos.logs or Path(tempfile.mkdtemp(prefix="d2f-chaos-"))
    logs.mkdir(parents=True, exist_ok=True)
    print(f"logs: {logs}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(directory, tied=True)
        os.environ.update(stack.up().variables)
        try:
            base = Path(directory) / "base"
            values: dict[str, Any] = {
                "num_steps": chaos.steps,
                "checkpoint_every": 50,
                "log_every": 4,
                "max_failures": -1,
            }
            if chaos.training == "finetune":
                write_tiny_base(base)
            peaceful, troubled = (
                make_config(str(base), name, **values)
                if chaos.training == "finetune"
                else make_distillation(base, name, **values)
                for name in ("peaceful", "troubled")
            )
            began = time.monotonic()
            Job(peaceful, logs).wait()
            middle = time.monotonic()
            with FaultProxy.before(os.environ["AWS_ENDPOINT_URL"], seed=chaos.seed) as proxy:
                proxy.error_rate, proxy.reset_rate = chaos.fault_rate, chaos.fault_rate / 2
                proxy.stall_rate, proxy.stall_seconds = chaos.stall_rate, STALL_SECONDS
                job, happened = run_troubled(troubled, chaos, logs, proxy)
            result = {
                "command": " ".join(sys.argv[1:]),
                "happened": happened,
                "requests": dict(proxy.counts),
                "submissions": job.submissions,
                "steps": chaos.steps,
                "seconds": {"peace": round(middle - began), "trouble": round(time.monotonic() - middle)},
            }
            print(result, flush=True)
            if isinstance(troubled, FinetuneConfig) and isinstance(peaceful, FinetuneConfig):
                assert_same_run(troubled, peaceful)
            else:
                assert_same_end(troubled, peaceful)
        finally:
            stack.down()
    if sum(happened.values()) < chaos.kills + chaos.outages:
        raise SystemExit("The training ended before all of that had happened. Raise --steps.")
    print("weights, moments, averages and samples are equal, and MLflow holds every step once")
    if chaos.results:
        chaos.results.write_text(json.dumps({**result, "equal": True}, indent=1) + "\n")


if __name__ == "__main__":
    main()
