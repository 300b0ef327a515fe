"""Kill a generation job at five moments and compare its output with an uninterrupted one's, byte for byte.

    python -m benchmarks.generate_kills --results docs/results/generate_kills.json

A local stack draws 2,000 prompts twice with emoji-sd. The second time one after another are killed by SIGKILL: an actor
that draws, the S3 server, the job's driver, the head node (Ray with all that runs on it, the driver too), and an actor
again. Servers are started again by `Stack.up`, the job by the same command. Afterwards every image and every index part
must be there once with the same bytes.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.generate.prompts import write_prompts
from d2f_core.storage import list_names, read_bytes
from infra.local.stack import Stack
from pipelines.cli import to_yaml
from tests.ray_processes import processes

ACTOR = "ray::MapWorker(MapBatches(JobsSampler"
TABLES = ("images", "index")


@dataclass(frozen=True, kw_only=True)
class KillsConfig:
    rows: int = 2000
    steps: int = 2
    chunk_size: int = 64
    results: Path | None = None
    """Where to write the figures as JSON."""


class Job:
    """The driver of a generation, submitted again when it has failed."""

    def __init__(self, config: GenerateConfig, directory: Path) -> None:
        self.config, self.submissions = config, 0
        self._file = directory / f"{config.output.rsplit('/', 1)[-1]}.yaml"
        self._file.write_text(to_yaml(config))
        self._log = self._file.with_suffix(".log").open("w")
        self.submit()

    def submit(self) -> None:
        command = [sys.executable, "-m", "pipelines.generate", "--config", str(self._file)]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self.submissions += 1

    def parts(self) -> int:
        return len(list_names(f"{self.config.output}/index"))

    def wait(self, done: Callable[[], bool] = lambda: False, seconds: float = 900) -> None:
        """Until `done`, or the job's end; a driver that fails is started again."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise SystemExit(f"the job does not end:\n{Path(self._log.name).read_text()[-3000:]}")
            if self.process.poll() == 0:
                return
            if self.process.poll():
                self.submit()
            time.sleep(0.3)


def kill_actor(job: Job, stack: Stack) -> None:
    job.wait(lambda: bool(processes(ACTOR)))
    processes(ACTOR)[-1].kill()


def kill_s3(job: Job, stack: Stack) -> None:
    kill_part(stack, "s3")


def kill_driver(job: Job, stack: Stack) -> None:
    job.process.kill()
    job.process.wait()
    job.submit()


def kill_node(job: Job, stack: Stack) -> None:
    job.process.kill()  # the driver of a submitted job runs on the head's node
    job.process.wait()
    kill_part(stack, "ray")


def kill_part(stack: Stack, name: str) -> None:
    for status in stack.status():
        if status.name == name:
            for pid in status.pids:
                if psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGKILL)
    stack.up()


KILLS = {"actor": kill_actor, "S3": kill_s3, "driver": kill_driver, "head node": kill_node, "actor again": kill_actor}


def main() -> None:
    config = tyro.cli(KillsConfig)
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(Path(directory, "stack"), tied=True)
        os.environ.update(stack.up().variables)
        try:
            figures = run(config, stack, Path(directory))
        finally:
            stack.down()
    print(json.dumps(figures, indent=1))
    if config.results:
        config.results.write_text(json.dumps(figures, indent=1) + "\n")


def run(config: KillsConfig, stack: Stack, directory: Path) -> dict[str, object]:
    prompts = "s3://d2f/kills/prompts.jsonl"
    write_prompts(prompts, [f"drawing number {row % 50}" for row in range(config.rows)])
    peaceful = GenerateConfig(
        prompts=prompts,
        model="infra/models/emoji-sd",
        output="s3://d2f/kills/whole",
        steps=(config.steps,),
        chunk_size=config.chunk_size,
    )
    began = time.perf_counter()
    Job(peaceful, directory).wait()
    seconds = {"uninterrupted": time.perf_counter() - began}
    killed = replace(peaceful, output="s3://d2f/kills/killed")
    began, job, at = time.perf_counter(), Job(killed, directory), []
    chunks = -(-config.rows // config.chunk_size)
    for number, (name, kill) in enumerate(KILLS.items(), start=1):
        job.wait(lambda number=number: job.parts() >= number * chunks // (len(KILLS) + 1))
        at.append({"killed": name, "chunks done": job.parts()})
        kill(job, stack)
        print(f"killed: {name}, with {at[-1]['chunks done']} of {chunks} chunks done", flush=True)
    job.wait()
    seconds["killed"] = time.perf_counter() - began
    different = [place for table in TABLES for place in compare(peaceful.output, killed.output, table)]
    if different:
        raise SystemExit(f"{len(different)} files differ, e.g. {different[:3]}")
    counts = {table: len(list_names(f"{killed.output}/{table}")) for table in TABLES}
    return {
        "rows": config.rows,
        "kills": at,
        "submissions": job.submissions,
        "files": counts,
        "different": 0,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def without_place(index: bytes, uri: str) -> list[dict[str, object]]:
    rows = pq.read_table(pa.BufferReader(index)).to_pylist()
    return [{**row, "image_uri": row["image_uri"].removeprefix(uri)} for row in rows]


def compare(one: str, other: str, table: str) -> list[str]:
    """Files that are missing in one of them, or differ; an index names its images by URI, which is evened out."""
    names = set(list_names(f"{one}/{table}")), set(list_names(f"{other}/{table}"))
    different = sorted(names[0] ^ names[1])
    for name in sorted(names[0] & names[1]):
        first, second = (read_bytes(f"{uri}/{table}/{name}") for uri in (one, other))
        if table == "index":
            first, second = (without_place(data, uri) for data, uri in ((first, one), (second, other)))
        if first != second:
            different.append(f"{table}/{name}")
    return different


if __name__ == "__main__":
    main()
