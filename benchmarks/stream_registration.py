"""How long it takes until the readers of many training workers are registered. The workers are simulated.

    python -m benchmarks.stream_registration --results stream_registration.json

A reader each: `data.stream.start_reader` is called from as many threads of one process as there are workers, with a
plan cut for that many, and registers their actors with a Ray head that this command starts. The actors also ask for a
resource that no node has, so that none is placed and no process starts. The clock ends when the head lists them all.

An execution of Ray Data each, as it was before: Ray Data's own coordinator, in this process, with as many nodes of 8
CPUs and a GPU as there are workers, is sent the request that an execution begins with, once per worker. What it would
send on to an autoscaler goes nowhere. Beyond `--executions-up-to` workers it would take minutes.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import ray
import tyro

from benchmarks.ray_internals import coordinator, registered_actors, resource_types
from benchmarks.streaming import heading, run
from benchmarks.streaming_memory import running
from d2f_core.data import stream
from d2f_core.data.manifest import Manifest, write_manifest, write_part
from d2f_core.data.plan_source import PlanSource
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.stream_plan import Source, StreamPlan

NODE = {"CPU": 8.0, "GPU": 1.0, "memory": 32e9, "object_store_memory": 9e9}
NOWHERE = {"a resource that no node has": 1}
LOOK_SECONDS, MOST_SECONDS = 0.01, 60.0


@dataclass(frozen=True, kw_only=True)
class Options:
    results: Path
    """File for the raw figures, JSON; written anew after every run."""
    workers: tuple[int, ...] = (64, 128, 256, 512, 1024)
    rounds: int = 3
    executions_up_to: int = 256


def plan_for(num_workers: int, directory: str) -> StreamPlan:
    """Two samples per worker and step, of a table of as many rows as four steps take."""
    batch = 2 * num_workers
    part = write_part(directory, "part-0.parquet", pa.table({"number": list(range(4 * batch))}))
    write_manifest(directory, Manifest(kind="numbers", files=(part,)))
    source = Source(uri=directory, order=SampleOrder(num_rows=4 * batch, batch=batch, lanes=num_workers))
    return StreamPlan(
        sources=(source,), columns=("number",), global_batch_size=batch, micro_batch_size=2, num_steps=4
    )  # fmt: skip


def register_readers(num_workers: int) -> float:
    """Seconds until the readers of so many simulated workers are known to the Ray that this process is connected to."""
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(num_workers) as threads:
        source = PlanSource(plan_for(num_workers, directory), num_workers=num_workers)
        with mock.patch.object(stream, "_reader_options", lambda: {"num_cpus": 0, "resources": NOWHERE}):
            began = time.perf_counter()
            readers = list(threads.map(lambda rank: stream.start_reader(source, rank), range(num_workers)))
        wanted = {reader._actor_id.hex() for reader in readers}
        while not wanted <= registered_actors():
            if time.perf_counter() > began + MOST_SECONDS:
                raise RuntimeError(f"{num_workers} readers were not registered within {MOST_SECONDS:.0f} s.")
            time.sleep(LOOK_SECONDS)
        seconds = time.perf_counter() - began
        for reader in readers:
            ray.kill(reader)
    return seconds


def register_executions(num_workers: int) -> float:
    """Seconds that Ray Data's coordinator takes for the first requests of so many executions."""
    nodes = [{"Alive": True, "NodeID": str(number), "Resources": NODE} for number in range(num_workers)]
    asked, types = coordinator(nodes), resource_types()
    began = time.perf_counter()
    for number in range(num_workers):
        asked.request_resources(f"data-{number}", [], 180.0, request_remaining=types)
    return time.perf_counter() - began


def in_a_process_of_its_own(num_workers: int, rounds: int) -> list[float]:
    """`register_readers` so many times. Ray reads how a head is found when it is imported."""
    argv = [sys.executable, "-m", "benchmarks.stream_registration", json.dumps([num_workers, rounds])]
    return run(argv, os.environ["AWS_ENDPOINT_URL"], rounds * MOST_SECONDS)["seconds"]


def figure(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})" if seconds else "not run"


def main(options: Options) -> None:
    runs: list[dict[str, Any]] = []
    report = {**heading(options), "runs": runs}
    print("| workers | a reader each, s | an execution each, s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as directory, running(directory):
        for workers in options.workers:
            rounds = options.rounds if workers <= options.executions_up_to else 0
            readers = in_a_process_of_its_own(workers, options.rounds)
            executions = [register_executions(workers) for _ in range(rounds)]
            runs.append({"workers": workers, "readers": readers, "executions": executions})
            options.results.write_text(json.dumps(report, indent=1, default=str) + "\n")
            print(f"| {workers} | {figure(readers)} | {figure(executions)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("["):
        num_workers, rounds = json.loads(sys.argv[1])
        ray.init(log_to_driver=False)
        print(json.dumps({"seconds": [register_readers(num_workers) for _ in range(rounds)]}), flush=True)
        ray.shutdown()
    else:
        main(tyro.cli(Options, description=__doc__))
