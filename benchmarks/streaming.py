"""How fast latents stream from S3 into torch batches: ours against webdataset, mosaicml-streaming (MDS) and litdata.

    python -m benchmarks.streaming --results streaming.json

Starts a local S3 server and a Ray head, installs the other readers from PyPI into an environment of their own (once),
writes the same random samples in every format (one fp16 array 4x64x64, an id and a caption each, files of 64 MB), and
reads them in turn, round by round, once through, 64 to a batch. In front of the server a proxy adds `--delays` seconds
to the first byte of each answer. Workers: two processes, of ours one with its threads; one torch thread everywhere. The
disk copies of MDS and litdata begin empty in every run; the server's files are in the page cache for all.

Scope of the shuffling, in samples: ours 16 windows of 512 = 8192; webdataset a buffer of 4096 in each of 2 workers,
which yields while it fills; MDS 8192 (`py1e`, drawn between 6144 and 10240 per shard); litdata a file per worker,
2 x 2000, as far as it goes. `rate` counts from the first batch on. `ours again` is the control: the spread of
`ours / ours again` is the finest difference that can be claimed. A ratio is void unless all its runs delivered every
sample once, with all its bytes. Memory is proportional set size (PSS), looked at from outside twice a second: ours of
the reading process and of Ray's node (raylet with object store, workers), of the others their processes; page cache
is not in it.

`python -m benchmarks.streaming ours JSON` is a single run of ours, `benchmarks/streaming_peers.py` one of the others.
"""

import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray
import torch
import tyro

from benchmarks import streaming_peers as peers
from benchmarks.streaming_peers import BATCH, READERS
from d2f_core.data.latents import arrays_to_table, table_to_arrays
from d2f_core.data.manifest import Manifest, read_manifest, write_manifest, write_part
from d2f_core.data.order import SampleOrder
from d2f_core.data.plan import Source, StreamPlan
from d2f_core.data.schema import array_field
from d2f_core.data.stream import micro_batches, worker_shard
from infra.local.processes import owned
from infra.local.stack import Stack

SYSTEMS = ("ours", *READERS, "ours again")
TORCH = "torch==2.13.0"
BUCKET = "s3://d2f"
LOOK_SECONDS = 0.5
ROWS_STEP = math.lcm(peers.WORKERS * peers.FILE_ROWS, peers.WORKERS * BATCH)
PACE = 0.8
EDGE_BATCHES = 16
"""Batches on each side of an epoch's end among which the longest wait is looked for."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TEXTS = [pa.field(name, pa.string(), nullable=False) for name in ("sample_id", "caption")]
SCHEMA = pa.schema([*TEXTS, array_field("latent_mean", "float16", peers.SHAPE)])


@dataclass(frozen=True, kw_only=True)
class Options:
    results: Path
    """File for the raw figures, JSON; written anew after every run."""
    rows: int = 16_000
    """Samples; a multiple of 16,000: both workers of each system then get whole files and whole batches. (litdata reads
    a file that two workers share anew for each sample.)"""
    rounds: int = 3
    delays: tuple[float, ...] = (0.0, 0.02, 0.05)
    """Seconds before the first byte of each answer of S3; 0 goes without the proxy."""
    memory_rows: int | None = None
    """Rows of the larger table for the memory figure; None: 10 times as many; 0: none."""
    memory_batches: int = 0
    """Batches after which the memory figure of the larger table ends; 0: the full pass."""
    peers_env: Path = Path(".local/peers-env")
    """Environment of the other readers; made when it is missing or its pins have changed."""
    run_seconds: float = 1800.0
    """Time limit of a single run."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.rows % ROWS_STEP or self.large_rows % BATCH:
            raise ValueError(
                f"rows={self.rows} must be a multiple of {ROWS_STEP}, memory_rows={self.memory_rows} one of {BATCH}."
            )

    @property
    def large_rows(self) -> int:
        return 10 * self.rows if self.memory_rows is None else self.memory_rows


def ours(uri: str, num_batches: int) -> peers.Batches:
    """Our reader: a plan, carried out by Ray Data."""
    manifest = read_manifest(uri)
    order = SampleOrder(num_rows=manifest.num_rows, batch=BATCH, lanes=16, window_rows=peers.SCOPE // 16)
    plan = StreamPlan(
        sources=(Source(uri=uri, order=order),),
        columns=("sample_id", "caption", "latent_mean"),
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        num_steps=num_batches,
    )
    for table in micro_batches(worker_shard(plan, rank=0, num_workers=1, first_step=0)):
        arrays = table_to_arrays(table, ["sample_id", "latent_mean"])
        yield arrays["sample_id"].tolist(), torch.from_numpy(arrays["latent_mean"])


def run_ours(uri: str, num_batches: int, step_seconds: float) -> dict[str, Any]:
    """One run in this process, connected to the Ray head that RAY_ADDRESS names."""
    names = ("AWS_ENDPOINT_URL", *ONE_THREAD)
    ray.init(log_to_driver=False, runtime_env={"env_vars": {name: os.environ[name] for name in names}})
    result = peers.consume(lambda: ours(uri, num_batches), step_seconds=step_seconds)
    ray.shutdown()
    return result


def write_ours(uri: str, rows: int) -> int:
    """Write our table; returns the checksum of its latents."""
    files, total = [], 0
    for number in range(peers.num_files(rows)):
        names, captions, latents = peers.file_samples(number, rows)
        table = arrays_to_table({"sample_id": names, "caption": captions, "latent_mean": latents}, SCHEMA)
        files.append(write_part(uri, f"part-{number:05d}.parquet", table))
        total += peers.checksum(torch.from_numpy(latents))
    write_manifest(uri, Manifest(kind="latents", files=tuple(files)))
    return total


def peers_python(directory: Path) -> Path:
    """The interpreter of the other readers' environment, installed when it is not there yet."""
    pins = Path(__file__).with_name("streaming_peers.txt")
    python, done, wanted = directory / "bin" / "python", directory / "installed.txt", f"{TORCH}\n{pins.read_text()}"
    if not done.exists() or done.read_text() != wanted:
        print(f"installing the other readers into {directory}", flush=True)
        shutil.rmtree(directory, ignore_errors=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        subprocess.run([*pip, TORCH], check=True)  # alone: then a CPU build is taken where pip offers one
        subprocess.run([*pip, "--no-deps", "-r", str(pins)], check=True)
        done.write_text(wanted)
    return python.absolute()


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


def run(argv: list[str], url: str, seconds: float, beside: tuple[int, ...] | None = None) -> dict[str, Any]:
    """One run in a process of its own that finds S3 at `url`; its figures.

    Args:
        beside: pids of processes that serve the run and whose memory counts with its own: then `peak_pss` and
            `pss_before` are in bytes. None: nobody looks, since a look takes time from the run.

    Raises:
        RuntimeError: it failed or took longer than `seconds`; with the end of what it wrote.
    """
    environment = {**os.environ, **ONE_THREAD, "AWS_ENDPOINT_URL": url, "PYTHONUNBUFFERED": "1"}
    pids, pipe = list(beside or ()), subprocess.PIPE
    with watched(pids) if beside is not None else nullcontext([]) as memory:
        process = subprocess.Popen(argv, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        pids.append(process.pid)
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException as error:  # Ctrl-C included: leave no loader behind
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"{argv[1:4]} took longer than {seconds:.0f} s. Raise --run-seconds.") from None
            raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {process.returncode}:\n{errors[-3000:]}")
    looks = {"peak_pss": max(memory), "pss_before": memory[0]} if memory else {}
    return {**json.loads(output.splitlines()[-1]), **looks}


@contextmanager
def s3_at(delay: float, endpoint: str) -> Iterator[str]:
    """The address of S3, or of a proxy, a process of its own, that adds `delay` seconds to each first byte."""
    if not delay:
        yield endpoint
        return
    argv = [sys.executable, "-m", "benchmarks.fault_proxy", "--target", endpoint, "--delay", str(delay)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


class Bench:
    """The servers, where the data are, and every run so far."""

    def __init__(self, options: Options, stack: Stack, endpoint: str) -> None:
        self.options, self.stack, self.endpoint = options, stack, endpoint
        self.python = str(peers_python(options.peers_env))
        self.checksums: dict[int, int] = {}
        self.runs: list[dict[str, Any]] = []

    def write_ours(self, rows: int) -> None:
        print(f"writing {rows} samples for ours", flush=True)
        self.checksums[rows] = write_ours(f"{BUCKET}/ours-{rows}", rows)

    def peer(self, system: str, what: str, url: str) -> dict[str, Any]:
        script = Path(__file__).with_name("streaming_peers.py")
        with tempfile.TemporaryDirectory() as local:
            uri, rows = f"{BUCKET}/{system}", str(self.options.rows)
            argv = [self.python, str(script), system, "--what", what, "--uri", uri, "--rows", rows, "--local", local]
            return run(argv, url, self.options.run_seconds)

    def ours(
        self, url: str, rows: int, num_batches: int, step_seconds: float = 0.0, *, look: bool = False
    ) -> dict[str, Any]:
        call = json.dumps([f"{BUCKET}/ours-{rows}", num_batches, step_seconds])
        argv = [sys.executable, "-m", "benchmarks.streaming", "ours", call]
        return run(argv, url, self.options.run_seconds, self.raylet() if look else None)

    def raylet(self) -> tuple[int, ...]:
        """Its pid: all that Ray starts for a run descends from it."""
        node = owned(self.stack.directory, "ray")
        return tuple(one.process.pid for one in node if one.process.name() == "raylet")

    def keep(self, kind: str, system: str, delay: float, rows: int, result: dict[str, Any], epochs: int = 1) -> None:
        """Add a run to the results; `complete`: it delivered each sample `epochs` times, with all its bytes."""
        waits, end = result.pop("waits"), rows // BATCH
        result["wait_share"] = sum(waits) / result["seconds"]
        result["longest_wait"] = max(waits)
        result["edge_wait"] = max(waits[end - EDGE_BATCHES : end + EDGE_BATCHES]) if epochs > 1 else None
        wanted = peers.digest(name for name in map(peers.sample_id, range(rows)) for _ in range(epochs))
        whole = result["digest"] == wanted and result["checksum"] == epochs * self.checksums[rows]
        result["complete"] = whole if result["samples"] == epochs * rows else None
        self.runs.append({"kind": kind, "system": system, "delay": delay, "rows": rows, **result})
        self.options.results.parent.mkdir(parents=True, exist_ok=True)
        machine = f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {TORCH}"
        report = {"command": " ".join(sys.argv), "machine": machine, "options": asdict(self.options), "runs": self.runs}
        self.options.results.write_text(json.dumps(report, indent=1, default=str) + "\n")
        peak = f"{result['peak_pss'] / 2**20:>7.0f} MB" if "peak_pss" in result else ""
        note = {True: "", None: "   not the whole table", False: "   NOT EVERY SAMPLE ONCE"}[result["complete"]]
        print(
            f"{kind:<8}{system:<11}{delay:>6.3f} s{rows:>8} rows{result['rate']:>9.0f} samples/s"
            f"{result['first_batch_seconds']:>7.2f} s to the first batch{peak}{note}",
            flush=True,
        )

    def rates(self, delay: float, url: str, kind: str = "rate") -> None:
        """One round: every system once."""
        rows = self.options.rows
        for system in SYSTEMS:
            peer = system in READERS
            result = self.peer(system, "read", url) if peer else self.ours(url, rows, rows // BATCH)
            self.keep(kind, system, delay, rows, result)

    def paced(self, delay: float, url: str) -> None:
        """Two epochs at 80 % of our own rate."""
        rows = self.options.rows
        rate = statistics.median(one["rate"] for one in self.of("rate", "ours", delay))
        result = self.ours(url, rows, 2 * rows // BATCH, BATCH / (PACE * rate))
        self.keep("paced", "ours", delay, rows, result, epochs=2)

    def memory(self) -> None:
        """Full passes over the table and over the larger one."""
        for rows in (self.options.rows, self.options.large_rows):
            if rows not in self.checksums:
                self.write_ours(rows)
            batches = rows // BATCH if rows == self.options.rows else self.options.memory_batches or rows // BATCH
            result = self.ours(self.endpoint, rows, min(batches, rows // BATCH), look=True)
            self.keep("memory", "ours", 0.0, rows, result)

    def of(self, kind: str, system: str, delay: float) -> list[dict[str, Any]]:
        return [run for run in self.runs if (run["kind"], run["system"], run["delay"]) == (kind, system, delay)]


def print_tables(bench: Bench) -> None:
    def middle(runs: list[dict[str, Any]], name: str) -> float:
        return statistics.median(run[name] for run in runs)

    print("\n| delay s | system | samples/s | ours / it: median (range) | ms a batch, ours - it | s to first |")
    print("|---|---|---|---|---|---|")
    for delay in bench.options.delays:
        mine = bench.of("rate", "ours", delay)
        for system in SYSTEMS:
            runs = bench.of("rate", system, delay)
            pairs = [(a["rate"], b["rate"]) for a, b in zip(mine, runs, strict=True) if a["complete"] and b["complete"]]
            ratios = [a / b for a, b in pairs]
            ratio, extra = "void", "void"
            if len(pairs) == len(runs):
                ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                extra = f"{statistics.median(1000 * BATCH * (1 / a - 1 / b) for a, b in pairs):+.1f}"
            print(
                f"| {delay:g} | {system} | {middle(runs, 'rate'):.0f} | {ratio} | {extra} | "
                f"{middle(runs, 'first_batch_seconds'):.1f} |"
            )
    print(f"\n| ours at {PACE:.0%} of its rate, delay s | share waited | longest wait ms | at the epoch's end ms |")
    print("|---|---|---|---|")
    for run in (run for run in bench.runs if run["kind"] == "paced"):
        waits = f"{1000 * run['longest_wait']:.0f} | {1000 * run['edge_wait']:.0f}"
        print(f"| {run['delay']:g} | {run['wait_share']:.2%} | {waits} |")
    print("\n| rows | samples read | peak MB | before MB |\n|---|---|---|---|")
    for run in (run for run in bench.runs if run["kind"] == "memory"):
        sizes = f"{run['peak_pss'] / 2**20:.0f} | {run['pss_before'] / 2**20:.0f}"
        print(f"| {run['rows']} | {run['samples']} | {sizes} |")


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(directory, parts=("s3", "ray"), tied=True, say=print)
        try:
            os.environ.update(stack.up().variables)
            bench = Bench(options, stack, os.environ["AWS_ENDPOINT_URL"])
            bench.write_ours(options.rows)
            for system in READERS:
                print(f"writing {options.rows} samples for {system}", flush=True)
                bench.peer(system, "write", bench.endpoint)
            bench.rates(0.0, bench.endpoint, kind="warm-up")
            for delay in options.delays:
                with s3_at(delay, bench.endpoint) as url:
                    for _ in range(options.rounds):
                        bench.rates(delay, url)
                    bench.paced(delay, url)
            if options.large_rows:
                bench.memory()
            print_tables(bench)
        finally:
            stack.down()


if __name__ == "__main__":
    if sys.argv[1:2] == ["ours"]:
        print(json.dumps(run_ours(*json.loads(sys.argv[2]))), flush=True)
    else:
        main(tyro.cli(Options))
