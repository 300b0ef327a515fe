"""Time and memory of FID and KID of two sets of images, from their stored features.

    python -m benchmarks.fid --rows 50000 --dimensions 2048 --results docs/results/fid.json

Writes two tables of random features, as an evaluation stores them, then reads and compares them in a fresh process. It
measures that process alone: reading, both distances, and the kernel's record of its largest resident memory (Linux).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tyro

from d2f_core.data.manifest import Manifest, read_manifest, write_manifest, write_part
from d2f_core.flow.evaluate.distances import FrechetReference
from d2f_core.flow.evaluate.feature_table import feature_schema
from d2f_core.flow.evaluate.plain_distances import PAIRED_ROWS, PlainSet, gather_plain, kid
from d2f_core.flow.evaluate.plain_table import read_plain

SETS = ("real", "made")


@dataclass(frozen=True, kw_only=True)
class FidConfig:
    rows: int = 50_000
    """Images of each set."""
    dimensions: int = 2048
    part_rows: int = 2000
    """Images per file."""
    results: Path | None = None
    place: Path | None = None
    """Directory of tables to measure; None: they are written, and measured by another process."""


def write_table(place: Path, config: FidConfig, seed: int) -> None:
    """Features from 0 on, of columns with different spread, like those of a pooled ReLU."""
    draw, files, schema = np.random.default_rng(seed), [], feature_schema(config.dimensions)
    spread = np.linspace(0.1, 1 + 0.01 * seed, config.dimensions, dtype=np.float32)
    for start in range(0, config.rows, config.part_rows):
        count = min(config.part_rows, config.rows - start)
        features = np.abs(draw.standard_normal((count, config.dimensions), np.float32)) * spread
        columns = {
            "row": np.arange(start, start + count),
            "sample_id": [f"{number:08d}" for number in range(start, start + count)],
            "steps": np.zeros(count, np.int32),
            "features": pa.FixedSizeListArray.from_arrays(features.reshape(-1), config.dimensions),
            "caption_score": pa.nulls(count, pa.float64()),
            "clip_features": pa.nulls(count, pa.list_(pa.float32())),
        }
        files.append(write_part(str(place), f"part-{start:08d}.parquet", pa.table(columns, schema=schema)))
    write_manifest(str(place), Manifest(kind="features", files=tuple(files), counts={"set": config.rows}))


def read_set(place: Path, config: FidConfig) -> PlainSet:
    parts = read_plain(str(place), read_manifest(str(place)), 0)
    return gather_plain(parts, total=config.rows, width=config.dimensions)


def measure(place: Path, config: FidConfig) -> dict[str, Any]:
    start = time.perf_counter()
    real, made = (read_set(place / name, config) for name in SETS)
    read = time.perf_counter()
    frechet = FrechetReference.of(real.moments).distance(made.moments)
    compared = time.perf_counter()
    kernel = kid(real.features, made.features)
    end = time.perf_counter()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return {
        "fid": frechet, "kid": kernel, "seconds": round(end - start, 1), "peak_rss_mb": int(peak[1]) * 1024 // 10**6,
        "seconds_reading_and_moments": round(read - start, 1), "seconds_fid": round(compared - read, 1),
        "seconds_kid": round(end - compared, 1),
    }  # fmt: skip


def main() -> None:
    config = tyro.cli(FidConfig)
    if config.place:
        print(json.dumps(measure(config.place, config)))
        return
    with tempfile.TemporaryDirectory() as place:
        for seed, name in enumerate(SETS):
            write_table(Path(place, name), config, seed)
        load = os.getloadavg()[0]
        command = [sys.executable, "-m", "benchmarks.fid", "--place", place]
        command += [f"--rows={config.rows}", f"--dimensions={config.dimensions}"]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    result = {
        "rows": config.rows, "dimensions": config.dimensions, "kid_rows": min(PAIRED_ROWS, config.rows),
        "cpus": os.cpu_count(), "load_before": round(load, 2), **found,
    }  # fmt: skip
    print(text := json.dumps(result, indent=1))
    if config.results:
        config.results.write_text(text + "\n")


if __name__ == "__main__":
    main()
