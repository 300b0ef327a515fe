"""Whether streaming takes more memory when the data grow tenfold.

    python -m benchmarks.streaming_memory --results streaming_memory.json

Writes two tables of latents (fp16 4x64x64, an id and a caption each) to a local S3 server, one ten times the other, and
reads each once by our reader, through Ray, as `benchmarks.streaming` does. The smaller one must be larger than what may
wait for a worker (`READY_BYTES`, 256 MiB), or the buffer is never full in its run. Memory is proportional set size
(PSS) of the reading process and of Ray's node (raylet with object store, workers), looked at from outside twice a
second; page cache is not in it.
"""

import json
import os
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro

from benchmarks.streaming import heading, is_complete, run
from benchmarks.streaming_ours import BUCKET, ours_command, write_ours
from benchmarks.streaming_peers import BATCH, FILE_ROWS
from infra.local.processes import owned
from infra.local.stack import Stack

LOOK_SECONDS = 0.5
LARGER = 10


@dataclass(frozen=True, kw_only=True)
class Options:
    results: Path
    """File for the raw figures, JSON; written anew after every run."""
    rows: int = 80_000
    """Samples of the smaller table, 32 KiB each; a multiple of 2,000."""
    rounds: int = 2
    run_seconds: float = 1800.0
    """Time limit of a single run."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.rows % FILE_ROWS or self.rows % BATCH:
            raise ValueError(f"rows={self.rows} must be a multiple of {FILE_ROWS} and of {BATCH}.")


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it; none when it has ended."""
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory_of(pids: list[int]) -> int:
    """Proportional set size, in bytes, of the processes and all below them."""
    total = 0
    for process in {process for pid in pids for process in family(pid)}:
        with suppress(psutil.NoSuchProcess):  # it has ended since it was listed
            total += process.memory_full_info().pss
    return total


@contextmanager
def watched(pids: list[int]) -> Iterator[list[int]]:
    """Look at the processes' memory twice a second; the list that it gives fills with what was found."""
    found, stop = [memory_of(pids)], threading.Event()

    def watch() -> None:
        while not stop.wait(LOOK_SECONDS):
            found.append(memory_of(pids))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


@contextmanager
def running(directory: str) -> Iterator[Stack]:
    """S3 with its data of before, and a new Ray node: an old one's object store keeps the pages that it ever used."""
    stack = Stack(directory, parts=("s3", "ray"), tied=True, say=print)
    try:
        os.environ.update(stack.up().variables)
        yield stack
    finally:
        stack.down()


def read_once(options: Options, stack: Stack, rows: int, checksum: int) -> dict[str, Any]:
    """A pass over the table of so many rows, and the memory that it took, in bytes."""
    node = owned(stack.directory, "ray")
    pids = [one.process.pid for one in node if one.process.name() == "raylet"]  # all that Ray starts descends from it
    command, url = ours_command(rows, rows // BATCH), os.environ["AWS_ENDPOINT_URL"]
    with watched(pids) as memory:
        result = run(command, url, options.run_seconds, pids.append)
    del result["waits"], result["row_waits"]
    looks = {"peak_pss": max(memory), "median_pss": statistics.median(memory), "pss_before": memory[0]}
    return {"rows": rows, **result, **looks, "complete": is_complete(result, rows, checksum)}


def main(options: Options) -> None:
    runs: list[dict[str, Any]] = []
    report = {**heading(options), "runs": runs}
    sizes = (options.rows, LARGER * options.rows)
    with tempfile.TemporaryDirectory() as directory:
        with running(directory):
            checksums = [write_ours(f"{BUCKET}/ours-{rows}", rows) for rows in sizes]
        print("| rows | peak MiB | median MiB | before MiB | samples/s | complete |\n|---|---|---|---|---|---|")
        for rows, checksum in options.rounds * list(zip(sizes, checksums, strict=True)):
            with running(directory) as stack:
                runs.append(read_once(options, stack, rows, checksum))
            options.results.write_text(json.dumps(report, indent=1, default=str) + "\n")
            memory = " | ".join(f"{runs[-1][name] / 2**20:.0f}" for name in ("peak_pss", "median_pss", "pss_before"))
            print(f"| {rows} | {memory} | {runs[-1]['rate']:.0f} | {runs[-1]['complete']} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
