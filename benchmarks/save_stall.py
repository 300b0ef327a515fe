"""How long a training thread stands still at most while a checkpoint is saved behind it.

    python -m benchmarks.save_stall --results docs/results/save_stall.json

The main thread wakes every millisecond, as a training does between two operators, and notes its longest gap: while
nothing else runs, while `safetensors.save` builds files of the same size in another thread, and while our writer saves
to a local disk and to a local S3 server; for comparison, while another process saves to that server, which keeps this
machine as busy and cannot hold this interpreter's lock. What the copy before takes, for which a training waits, is
noted apart.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save as library_save
from torch import Tensor

from benchmarks.streaming import heading
from d2f_core.train.checkpoint import KINDS
from d2f_core.train.checkpoint_writer import CheckpointWriter
from d2f_core.train.retention_rules import Retention
from infra.local.stack import Stack

TICK_SECONDS, LAYER = 0.001, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Options:
    results: Path
    """File for the raw figures, JSON."""
    megabytes: int = 800
    """Of all four kinds of tensors together, in tensors of 4 MiB."""
    rounds: int = 5


def longest_gap(done: Callable[[], bool]) -> float:
    """Seconds between two turns of this thread at most, until `done`."""
    longest, last = 0.0, time.perf_counter()
    while not done():
        time.sleep(TICK_SECONDS)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def in_a_thread(call: Callable[[], Any]) -> dict[str, float]:
    thread = threading.Thread(target=call)
    began = time.perf_counter()
    thread.start()
    gap = longest_gap(lambda: not thread.is_alive())
    return {"longest_gap_ms": 1e3 * gap, "seconds": time.perf_counter() - began}


def saved(output: str, tensors: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    writer = CheckpointWriter(output, "a", 0, 1, Retention())
    began = time.perf_counter()
    writer.save(1, samples=1, identity="benchmark", tensors=tensors, state={})
    copied = time.perf_counter()
    gap = longest_gap(lambda: bool(writer.poll() or writer.last_complete))
    found = {"longest_gap_ms": 1e3 * gap, "seconds": time.perf_counter() - copied, "copy_seconds": copied - began}
    writer.wait()
    writer.close()
    return found


def random_tensors(megabytes: int) -> dict[str, dict[str, Tensor]]:
    each = max(1, megabytes * 10**6 // (4 * LAYER * len(KINDS)))
    return {kind: {f"layer.{number}": torch.randn(LAYER) for number in range(each)} for kind in KINDS}


def save_elsewhere(output: str, megabytes: int, copied: Any) -> None:
    """In a process of its own: save once, and say when the tensors are copied."""
    writer = CheckpointWriter(output, "a", 0, 1, Retention())
    writer.save(1, samples=1, identity="benchmark", tensors=random_tensors(megabytes), state={})
    copied.set()
    writer.wait()


def saved_elsewhere(output: str, megabytes: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    copied = context.Event()
    process = context.Process(target=save_elsewhere, args=(output, megabytes, copied))
    process.start()
    copied.wait()
    began = time.perf_counter()
    gap = longest_gap(lambda: not process.is_alive())
    return {"longest_gap_ms": 1e3 * gap, "seconds": time.perf_counter() - began}


def measure(options: Options, directory: Path) -> list[dict[str, Any]]:
    tensors, rows = random_tensors(options.megabytes), []
    for number in range(options.rounds):
        cases = {
            "nothing": lambda: in_a_thread(lambda: time.sleep(3)),
            "safetensors.save": lambda: in_a_thread(lambda: [library_save(named) for named in tensors.values()]),
            "to a disk": lambda number=number: saved(f"{directory}/{number}", tensors),
            "to S3 by another process": lambda number=number: saved_elsewhere(
                f"s3://d2f/save-stall/{number}-elsewhere", options.megabytes
            ),
            "to S3": lambda number=number: saved(f"s3://d2f/save-stall/{number}", tensors),
        }
        for name, case in cases.items():
            rows.append({"round": number, "case": name, **case()})
            print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(directory / str(number))
    return rows


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as directory:
        stack = Stack(Path(directory, "stack"), parts=("s3",), tied=True, say=print)
        try:
            os.environ.update(stack.up().variables)
            rows = measure(options, Path(directory))
        finally:
            stack.down()
    options.results.write_text(json.dumps({**heading(options), "runs": rows}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
