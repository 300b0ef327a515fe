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
sample once, with all its bytes. What ours takes of memory: `benchmarks.streaming_memory`.

`benchmarks/streaming_ours.py` is a single run of ours, `benchmarks/streaming_peers.py` one of the others.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import streaming_peers as peers
from benchmarks.streaming_ours import BUCKET, ONE_THREAD, ours_command, write_ours
from benchmarks.streaming_peers import BATCH, READERS
from infra.local.stack import Stack

SYSTEMS = ("ours", *READERS, "ours again")
TORCH = "torch==2.13.0"
ROWS_STEP = math.lcm(peers.WORKERS * peers.FILE_ROWS, peers.WORKERS * BATCH)
PACE, START_SECONDS = 0.8, 2.0
EDGE_BATCHES = 16
"""Batches on each side of an epoch's end among which the longest wait is looked for."""


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
    peers_env: Path = Path(".local/peers-env")
    """Environment of the other readers; made when it is missing or its pins have changed."""
    run_seconds: float = 1800.0
    """Time limit of a single run."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.rows % ROWS_STEP:
            raise ValueError(f"rows={self.rows} must be a multiple of {ROWS_STEP}.")


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


def run(argv: list[str], url: str, seconds: float, started: Callable[[int], None] = lambda pid: None) -> dict[str, Any]:
    """One run in a process of its own that finds S3 at `url`; its figures.

    Args:
        started: told the process's id.

    Raises:
        RuntimeError: it failed or took longer than `seconds`; with the end of what it wrote.
    """
    environment = {**os.environ, **ONE_THREAD, "AWS_ENDPOINT_URL": url, "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    started(process.pid)
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
    return json.loads(output.splitlines()[-1])


def is_complete(result: dict[str, Any], rows: int, checksum: int, epochs: int = 1) -> bool:
    """Whether a run delivered each sample `epochs` times, with all its bytes."""
    wanted = peers.digest(name for name in map(peers.sample_id, range(rows)) for _ in range(epochs))
    return result["digest"] == wanted and result["checksum"] == epochs * checksum


def heading(options: Any) -> dict[str, Any]:
    """What stands above the runs in a file of results."""
    command = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {TORCH}"
    return {"command": " ".join(command), "machine": machine, "options": asdict(options)}


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

    def __init__(self, options: Options, endpoint: str) -> None:
        self.options, self.endpoint = options, endpoint
        self.python = str(peers_python(options.peers_env))
        print(f"writing {options.rows} samples for ours", flush=True)
        self.checksum = write_ours(f"{BUCKET}/ours-{options.rows}", options.rows)
        self.runs: list[dict[str, Any]] = []

    def peer(self, system: str, what: str, url: str) -> dict[str, Any]:
        script = Path(__file__).with_name("streaming_peers.py")
        with tempfile.TemporaryDirectory() as local:
            uri, rows = f"{BUCKET}/{system}", str(self.options.rows)
            argv = [self.python, str(script), system, "--what", what, "--uri", uri, "--rows", rows, "--local", local]
            return run(argv, url, self.options.run_seconds)

    def keep(self, kind: str, system: str, delay: float, result: dict[str, Any], epochs: int = 1) -> None:
        """Add a run to the results."""
        whole, end = result.pop("waits"), self.options.rows // BATCH
        waits = result.pop("row_waits", whole)
        result["wait_share"] = sum(waits) / result["seconds"]
        result["arrays_share"] = (sum(whole) - sum(waits)) / result["seconds"]
        result["median_wait"] = statistics.median(waits)
        result["longest_wait"] = max(waits)
        result["edge_wait"] = max(waits[end - EDGE_BATCHES : end + EDGE_BATCHES]) if epochs > 1 else None
        result["complete"] = is_complete(result, self.options.rows, self.checksum, epochs)
        self.runs.append({"kind": kind, "system": system, "delay": delay, **result})
        self.options.results.parent.mkdir(parents=True, exist_ok=True)
        report = {**heading(self.options), "runs": self.runs}
        self.options.results.write_text(json.dumps(report, indent=1, default=str) + "\n")
        note = "" if result["complete"] else "   NOT EVERY SAMPLE ONCE"
        print(
            f"{kind:<8}{system:<11}{delay:>6.3f} s{result['rate']:>9.0f} samples/s"
            f"{result['first_batch_seconds']:>7.2f} s to the first batch{note}",
            flush=True,
        )

    def rates(self, delay: float, url: str, kind: str = "rate") -> None:
        """One round: every system once."""
        rows, seconds = self.options.rows, self.options.run_seconds
        for system in SYSTEMS:
            peer = system in READERS
            result = self.peer(system, "read", url) if peer else run(ours_command(rows, rows // BATCH), url, seconds)
            self.keep(kind, system, delay, result)

    def paced(self, delay: float, url: str) -> None:
        """Two epochs at 80 % of our own rate, after as long a start as the engine of a training has."""
        rows = self.options.rows
        rate = statistics.median(one["rate"] for one in self.of("rate", "ours", delay))
        command = ours_command(rows, 2 * rows // BATCH, BATCH / (PACE * rate), START_SECONDS)
        self.keep("paced", "ours", delay, run(command, url, self.options.run_seconds), epochs=2)

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
    print(
        f"\n| ours at {PACE:.0%} of its rate, delay s | waited | into arrays | wait: median, longest, epoch's end ms |"
    )
    print("|---|---|---|---|")
    for run in (run for run in bench.runs if run["kind"] == "paced"):
        waits = f"{1e3 * run['median_wait']:.2f}, {1e3 * run['longest_wait']:.0f}, {1e3 * run['edge_wait']:.0f}"
        print(f"| {run['delay']:g} | {run['wait_share']:.2%} | {run['arrays_share']:.2%} | {waits} |")


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(directory, parts=("s3", "ray"), tied=True, say=print)
        try:
            os.environ.update(stack.up().variables)
            bench = Bench(options, os.environ["AWS_ENDPOINT_URL"])
            for system in READERS:
                print(f"writing {options.rows} samples for {system}", flush=True)
                bench.peer(system, "write", bench.endpoint)
            bench.rates(0.0, bench.endpoint, kind="warm-up")
            for delay in options.delays:
                with s3_at(delay, bench.endpoint) as url:
                    for _ in range(options.rounds):
                        bench.rates(delay, url)
                    bench.paced(delay, url)
            print_tables(bench)
        finally:
            stack.down()


if __name__ == "__main__":
    main(tyro.cli(Options))
