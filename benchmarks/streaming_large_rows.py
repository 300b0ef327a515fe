"""What streaming rows of megabytes takes of memory, beside what it may take.

    python -m benchmarks.streaming_large_rows --results streaming_large_rows.json

Writes a table of random arrays of 2 MB (fp16, 1000x1000) to a local S3 server, in row groups as `rows_per_group` says,
and reads it once through Ray Data, shuffled over `--lanes` windows of `--window-rows`: by default 8 windows of 32,
which fit into the reader's buffer, and then 8 of 512, which do not, so that row groups are read again. The consumer
takes its first micro-batch, waits until everything that may wait for it does, and takes the rest as fast as it comes.

Looked at from outside, five times a second: the anonymous memory (what is in no file) of the actor that reads, beside
the plan's `buffer_bytes`; and the pages of Ray's object store, beside `READY_BYTES`. Before it reads, an actor has some
200 MiB of modules; `reader before` is the first that was seen of it.
"""

import json
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
import tyro

from benchmarks.streaming import heading, run
from benchmarks.streaming_memory import family, running
from benchmarks.streaming_ours import BUCKET
from d2f_core.data.arrays import arrays_to_table
from d2f_core.data.manifest import Manifest, read_manifest, rows_per_group, write_manifest, write_part
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.schema import array_field
from d2f_core.data.stream import READY_BYTES, micro_batches, worker_shard
from d2f_core.data.stream_plan import BUFFER_BYTES, Source, StreamPlan
from infra.local.processes import owned

SHAPE, ROW_BYTES, FILE_ROWS = (1000, 1000), 2_000_000, 100
SCHEMA = pa.schema([pa.field("number", pa.int64(), nullable=False), array_field("array", "float16", SHAPE)])
LOOK_SECONDS, FIRST_SECONDS = 0.2, 20.0


@dataclass(frozen=True, kw_only=True)
class Options:
    results: Path
    """File for the raw figures, JSON; written anew after every run."""
    rows: int = 2_000
    """Rows of 2 MB; a multiple of 100."""
    batch: int = 16
    micro_batch: int = 8
    lanes: int = 8
    window_rows: tuple[int, ...] = (32, 512)
    run_seconds: float = 900.0
    """Time limit of a single run."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.rows % FILE_ROWS:
            raise ValueError(f"rows={self.rows} must be a multiple of {FILE_ROWS}.")


def write_table(uri: str, rows: int) -> None:
    files = []
    for first in range(0, rows, FILE_ROWS):
        arrays = np.random.default_rng(first).standard_normal((FILE_ROWS, *SHAPE), np.float32).astype("f2")
        arrays[:, 0, 0] = 0
        table = arrays_to_table({"number": np.arange(first, first + FILE_ROWS), "array": arrays}, SCHEMA)
        name = f"part-{first:06d}.parquet"
        files.append(write_part(uri, name, table, row_group_rows=rows_per_group(ROW_BYTES)))
    write_manifest(uri, Manifest(kind="arrays", files=tuple(files)))


def read_table(uri: str, batch: int, micro_batch: int, lanes: int, window_rows: int) -> dict[str, Any]:
    """A pass over the table, in this process, connected to the Ray head that RAY_ADDRESS names."""
    ray.init(log_to_driver=False, runtime_env={"env_vars": {"AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}})
    rows = read_manifest(uri).num_rows
    order = SampleOrder(num_rows=rows, batch=batch, lanes=lanes, window_rows=window_rows)
    plan = StreamPlan(
        sources=(Source(uri=uri, order=order),), columns=("number", "array"), global_batch_size=batch,
        micro_batch_size=micro_batch, num_steps=rows // batch,
    )  # fmt: skip
    stream = micro_batches(worker_shard(plan, rank=0, num_workers=1, first_step=0))
    seen = next(stream).column("number").to_pylist()
    time.sleep(FIRST_SECONDS)
    began, first = time.perf_counter(), len(seen)
    for table in stream:
        seen += table.column("number").to_pylist()
    seconds = time.perf_counter() - began
    ray.shutdown()
    return {
        "rate": (len(seen) - first) / seconds,
        "complete": sorted(seen) == list(range(len(seen))),
        "rows": len(seen),
    }


def anonymous_memory(pid: int) -> int:
    """Bytes; pages of the object store, which a process has mapped that writes or reads there, are not among them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def object_store(raylet: int) -> int:
    """Bytes of the object store that were ever used: it is a file in memory that the raylet has open."""
    files = (link for link in Path(f"/proc/{raylet}/fd").iterdir() if "plasma" in os.readlink(link))
    found = {(stat.st_dev, stat.st_ino): 512 * stat.st_blocks for stat in map(os.stat, files)}
    return sum(found.values())


class Watch:
    """Peaks, in bytes, of what Ray's processes below `raylet` take, until it is stopped."""

    def __init__(self, raylet: int) -> None:
        self.reader, self.before, self.store = 0, 0, 0
        self._raylet, self._stop = raylet, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self.store = max(self.store, object_store(self._raylet))
            for process in family(self._raylet):
                with suppress(psutil.NoSuchProcess, FileNotFoundError):  # it has ended since it was listed
                    if "BlockReader" in " ".join(process.cmdline()):
                        found = anonymous_memory(process.pid)
                        self.reader, self.before = max(self.reader, found), self.before or found


def measure(options: Options, directory: str, uri: str, window_rows: int) -> dict[str, Any]:
    with running(directory) as stack:
        pids = [one.process.pid for one in owned(stack.directory, "ray") if one.process.name() == "raylet"]
        call = json.dumps([uri, options.batch, options.micro_batch, options.lanes, window_rows])
        argv = [sys.executable, "-m", "benchmarks.streaming_large_rows", call]
        with Watch(pids[0]) as watch:
            result = run(argv, os.environ["AWS_ENDPOINT_URL"], options.run_seconds)
    limits = {"buffer_bytes": BUFFER_BYTES, "ready_bytes": READY_BYTES}
    peaks = {"reader_peak": watch.reader, "reader_before": watch.before, "store_peak": watch.store}
    return {"window_rows": window_rows, **result, **peaks, **limits}


def main(options: Options) -> None:
    runs: list[dict[str, Any]] = []
    report = {**heading(options), "runs": runs}
    uri = f"{BUCKET}/large-rows-{options.rows}"
    with tempfile.TemporaryDirectory() as directory:
        with running(directory):
            write_table(uri, options.rows)
        print("| window_rows | reader MiB | reader before | its buffer | store MiB | its limit | rows/s | complete |")
        print("|---|---|---|---|---|---|---|---|")
        for window_rows in options.window_rows:
            one = measure(options, directory, uri, window_rows)
            runs.append(one)
            options.results.write_text(json.dumps(report, indent=1, default=str) + "\n")
            names = ("reader_peak", "reader_before", "buffer_bytes", "store_peak", "ready_bytes")
            text = " | ".join(f"{one[name] / 2**20:.0f}" for name in names)
            print(f"| {window_rows} | {text} | {one['rate']:.0f} | {one['complete']} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("["):
        print(json.dumps(read_table(*json.loads(sys.argv[1]))), flush=True)
    else:
        main(tyro.cli(Options))
