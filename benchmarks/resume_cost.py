"""What a resume costs: time and S3 requests from a cold reader to its first micro-batch, anywhere in an epoch.

    python -m benchmarks.resume_cost --results docs/results/resume_cost.json

A local S3 server holds two tables of latents, one ten times as long as the other. A worker's reader is made anew at 0,
10, 50, 90 and 99 % of an epoch, in turn, and again in the next round; 0 % is the start of a training that was never
interrupted. Beside it, what a worker does before it reads rows, in a table of a thousand million of which only the
manifest is there: read that, plan a step of one of 1,024 workers, and find the files and row groups of its windows.
"""

import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tyro

from benchmarks.fault_proxy import FaultProxy
from d2f_core.data.arrays import arrays_to_table
from d2f_core.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    TableFile,
    read_manifest,
    run_lengths,
    write_manifest,
    write_part,
)
from d2f_core.data.plan_reader import PlanReader
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.schema import ROW_GROUP_ROWS, array_field
from d2f_core.data.stream_plan import Source, StreamPlan
from d2f_core.data.table_reader import TableReader
from d2f_core.storage import join, read_bytes
from infra.local.stack import Stack

SHAPE, FILE_ROWS = (4, 16, 16), 10_000
SCHEMA = pa.schema([array_field("latent_mean", "float16", SHAPE)])
HUGE, HUGE_FILE_ROWS, HUGE_WORKERS = 1_000_000_000, 50_000, 1024


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    rows: int = 20_000
    """Of the smaller table; the other has ten times as many."""
    at: tuple[float, ...] = (0.0, 0.1, 0.5, 0.9, 0.99)
    """Shares of the epoch."""
    rounds: int = 7
    workers: int = 2
    batch: int = 64
    """Samples per step, over all workers."""
    delay: float = 0.0
    """Seconds before the first byte of each answer of S3."""
    results: Path | None = None


def write_table(uri: str, rows: int) -> None:
    draw, files = np.random.default_rng(0), []
    for number in range(rows // FILE_ROWS):
        latents = draw.standard_normal((FILE_ROWS, *SHAPE), dtype=np.float32)
        files.append(write_part(uri, f"part-{number:05d}.parquet", arrays_to_table({"latent_mean": latents}, SCHEMA)))
    write_manifest(uri, Manifest(kind="latents", files=tuple(files)))


def make_plan(config: ResumeConfig, uri: str, rows: int) -> StreamPlan:
    return StreamPlan(
        sources=(Source(uri=uri, order=SampleOrder(num_rows=rows, batch=config.batch)),),
        columns=("latent_mean",),
        global_batch_size=config.batch,
        micro_batch_size=config.batch // config.workers,
        num_steps=2 * rows // config.batch,
    )


def resume(config: ResumeConfig, plan: StreamPlan, share: float) -> float:
    """Seconds of a worker that begins there, to its first rows."""
    rows = plan.sources[0].order.num_rows
    began = time.perf_counter()
    reader = PlanReader(plan, 0, config.workers, int(share * rows) // config.batch)
    reader.read(0)
    seconds = time.perf_counter() - began
    reader._pool.shutdown(cancel_futures=True)  # what it reads ahead would take the next one's time
    return seconds


def write_huge_manifest(uri: str) -> None:
    full, rest = divmod(HUGE_FILE_ROWS, ROW_GROUP_ROWS)
    files = tuple(
        TableFile(
            path=f"part-{number:06d}-00000.parquet",
            rows=HUGE_FILE_ROWS,
            size=HUGE_FILE_ROWS * 8192,
            sha256=hashlib.sha256(str(number).encode()).hexdigest(),
            row_groups=run_lengths([ROW_GROUP_ROWS] * full + [rest] * bool(rest)),
        )
        for number in range(HUGE // HUGE_FILE_ROWS)
    )
    write_manifest(uri, Manifest(kind="latents", files=files))


def plan_huge(uri: str, share: float, seed: int) -> dict[str, float]:
    """Seconds by part: everything that one of 1,024 workers does before it reads its first rows there."""
    times = [time.perf_counter()]
    manifest = read_manifest(uri)
    times.append(time.perf_counter())
    reader = TableReader(uri, manifest, ("latent_mean",))
    times.append(time.perf_counter())
    order = SampleOrder(num_rows=HUGE, batch=HUGE_WORKERS * 64, lanes=HUGE_WORKERS, seed=seed)
    _, rows = order.at(np.arange(64) + int(share * HUGE))
    times.append(time.perf_counter())
    for window in np.unique(order.window_of(rows)).tolist():
        first, end = order.window_bounds(window)
        reader.row_groups(*reader.groups_of(np.array([first, end - 1])).tolist())
    times.append(time.perf_counter())
    return dict(zip(("manifest", "reader", "order", "row groups"), np.diff(times).tolist(), strict=True))


def planning(config: ResumeConfig, uri: str) -> dict[str, Any]:
    """What `plan_huge` takes, each time in an epoch that was not looked at before; the manifest's bytes, and those of
    memory at the most while it is read and the reader made."""
    write_huge_manifest(uri)
    seconds = {f"{share:.0%}": plan_huge(uri, share, seed) for seed, share in enumerate(config.at)}
    tracemalloc.start()
    TableReader(uri, read_manifest(uri), ("latent_mean",))
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = len(read_bytes(join(uri, MANIFEST_NAME)))
    return {"rows": HUGE, "files": HUGE // HUGE_FILE_ROWS, "bytes": size, "memory": memory, "seconds": seconds}


def run(config: ResumeConfig, proxy: FaultProxy) -> list[dict[str, Any]]:
    found = []
    for rows in (config.rows, 10 * config.rows):
        uri = f"s3://d2f/resume-{rows}"
        write_table(uri, rows)
        plan = make_plan(config, uri, rows)
        resume(config, plan, 0.0)  # warm-up: imports, connections
        seconds: dict[float, list[float]] = {share: [] for share in config.at}
        requests = dict.fromkeys(config.at, 0)
        for _ in range(config.rounds):
            for share in config.at:
                before = proxy.counts["requests"]
                seconds[share].append(resume(config, plan, share))
                requests[share] = proxy.counts["requests"] - before
        found += [
            {"rows": rows, "at": share, "seconds": seconds[share], "requests": requests[share]} for share in config.at
        ]
    return found


def main() -> None:
    config = tyro.cli(ResumeConfig)
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(directory, parts=("s3",), tied=True)
        try:
            os.environ.update(stack.up().variables)
            with FaultProxy.before(os.environ["AWS_ENDPOINT_URL"]) as proxy:
                os.environ["AWS_ENDPOINT_URL"] = proxy.url
                proxy.first_byte_delay = config.delay
                found = run(config, proxy)
                planned = planning(config, "s3://d2f/resume-huge")
        finally:
            stack.down()
    print("| rows | at, of the epoch | s to the first rows: median (range) | of it at 0 % | S3 requests |")
    print("|---|---|---|---|---|")
    for one in found:
        start = next(each for each in found if each["rows"] == one["rows"] and not each["at"])["seconds"]
        ratio = statistics.median(a / b for a, b in zip(one["seconds"], start, strict=True))
        low, high = min(one["seconds"]), max(one["seconds"])
        print(
            f"| {one['rows']} | {one['at']:.0%} | {statistics.median(one['seconds']):.3f} ({low:.3f} to {high:.3f}) | "
            f"{ratio:.2f} | {one['requests']} |"
        )
    print(
        f"\nplanning among {HUGE:,} rows in {planned['files']:,} files (a manifest of {planned['bytes'] / 1e6:.1f} MB, "
        f"at most {planned['memory'] / 2**20:.0f} MiB of memory):"
    )
    for at, parts in planned["seconds"].items():
        each = ", ".join(f"{name} {seconds:.3f}" for name, seconds in parts.items())
        print(f"at {at}: {sum(parts.values()):.2f} s ({each})")
    if config.results:
        machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
        content = {"machine": machine, "delay": config.delay, "resumes": found, "planning": planned}
        config.results.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
