"""Memory and time of what a driver does with a large index: the report's images, the contact sheet's rows, and a depth
evaluation's own part.

    python -m benchmarks.index_memory --rows 10000000 --results docs/results/index_memory.json

It writes an index of so many rows, as jobs write theirs (of a chunk all images at one number of steps, then at the
next), and the errors that a depth evaluation's actors would have written, into a temporary directory: some 300 bytes a
row. Then a fresh process does each piece of work, and its largest resident memory is read from the kernel's record.
Linux alone.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from PIL import Image

STEPS = (1, 2, 4, 10)
INDEX, ERRORS = "generation", "evaluation"
Work = Literal["report", "sheet", "depth"]


@dataclass(frozen=True, kw_only=True)
class Config:
    rows: int = 10_000_000
    """Of the index; a quarter as many images."""
    rows_per_part: int = 100_000
    replicates: int = 20
    """Bootstrap replicates of the depth evaluation. They cost time, a row of memory each one after the other."""
    works: tuple[Work, ...] = ("report", "sheet", "depth")
    results: Path | None = None
    folder: Path | None = None
    """Where to write; None: a temporary directory, removed at the end."""
    measure: Work | None = None
    """Do this work in `folder`, and print what it took: for the processes that this one starts."""


def sample_ids(first: int, count: int) -> list[str]:
    return [hashlib.sha256(b"%d" % number).hexdigest()[:32] for number in range(first, first + count)]


def write_index(folder: Path, config: Config) -> None:
    """The index of a generation and of predicted depth in one, and the images of the first prompts."""
    from d2f_core.batch.output import part_name
    from d2f_core.data.manifest import Manifest, describe_file, write_manifest

    per_part = config.rows_per_part // len(STEPS)
    (folder / INDEX / "index").mkdir(parents=True)
    (folder / "images").mkdir()
    files = []
    for part in range(config.rows // config.rows_per_part):
        names = sample_ids(part * per_part, per_part)
        rows = {"sample_id": names * len(STEPS), "steps": np.repeat(np.array(STEPS, np.int32), per_part)}
        rows["image_uri"] = [f"{folder}/images/{name}-{steps}.png" for steps in STEPS for name in names]
        rows["depth_uri"] = [f"{folder}/depth/{part:06d}/{name}-{steps}.npy" for steps in STEPS for name in names]
        rows["prompt"] = [f"a picture of thing {name} on a table, painted in oil" for name in names] * len(STEPS)
        count = len(rows["steps"])
        rows |= {name: [value] * count for name, value in (("model_uri", "models:/depth/1"), ("solver", "euler"))}
        rows |= {"num_evaluations": rows["steps"], "resolution": np.full(count, 512, np.int32)}
        rows["error"] = pa.nulls(count, pa.string())
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(rows), sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        (folder / INDEX / part_name(part)).write_bytes(data)
        files.append(describe_file(part_name(part), data))
        for name in names[:64] if part == 0 else ():
            for steps in STEPS:
                Image.new("RGB", (64, 64), "red").save(folder / f"images/{name}-{steps}.png")
    prints = {"task": "image_to_depth", "crop": "whole", "steps": list(STEPS)}
    write_manifest(str(folder / INDEX), Manifest(kind="generations", files=tuple(files), fingerprint=prints))


def error_parts(folder: Path, config: Config):
    from d2f_core.flow.depth.error_parts import ErrorParts
    from d2f_core.flow.depth.protocol import Protocol

    images = config.rows // len(STEPS)
    return ErrorParts(
        uri=str(folder / ERRORS), truth="", trained_on="", rows=images, trained_rows=images, resolution=64,
        rows_per_part=config.rows_per_part // len(STEPS), protocol=Protocol(),
    )  # fmt: skip


def write_errors(folder: Path, config: Config) -> None:
    """The parts of a depth evaluation of this index."""
    from d2f_core.flow.depth.config import FLOORS
    from d2f_core.flow.depth.error_parts import ERROR_SCHEMA
    from d2f_core.flow.depth.metrics import METRICS

    parts, predictors = error_parts(folder, config), [*((floor, 0) for floor in FLOORS), *(("m", s) for s in STEPS)]
    draw = np.random.default_rng(0)
    for number in range(parts.chunks(parts.rows)):
        rows = parts.chunk(number, parts.rows)
        count = len(rows) * len(predictors)
        columns = {
            "row": np.repeat(rows, len(predictors)),
            "sample_id": np.repeat(sample_ids(int(rows[0]), len(rows)), len(predictors)),
            "role": [role for role, _ in predictors] * len(rows),
            "evaluations": [evaluations for _, evaluations in predictors] * len(rows),
            **{name: draw.uniform(0.05, 0.2, count).astype(np.float32).astype(float) for name in METRICS},
            "missing": pa.nulls(count, pa.string()),
        }
        parts.write_part(number, pa.table(columns, schema=ERROR_SCHEMA))


def do_report(folder: Path, config: Config) -> object:
    from d2f_core.flow.evaluate.report import shown_images

    return len(shown_images({"candidate": str(folder / INDEX)}, 6))


def do_sheet(folder: Path, config: Config) -> object:
    from d2f_core.flow.generate.config import ContactSheetConfig
    from d2f_core.flow.generate.contact_sheet import check_contact_sheet

    wanted = ContactSheetConfig(generations=(str(folder / INDEX),), output=str(folder / "sheet.png"))
    return sum(table.num_rows for table in check_contact_sheet(wanted).tables)


def do_depth(folder: Path, config: Config) -> object:
    """Find all maps, and estimate every metric from the errors of every image."""
    from d2f_core.data.manifest import read_manifest
    from d2f_core.flow.depth.config import FLOORS
    from d2f_core.flow.depth.errors import estimate_metric
    from d2f_core.flow.depth.map_index import read_maps
    from d2f_core.flow.depth.metrics import METRICS

    uri = str(folder / INDEX)
    _, maps = read_maps(uri, read_manifest(uri).fingerprint)
    parts, roles = error_parts(folder, config), [(floor, 0) for floor in FLOORS]
    predictors = [*roles, *((one.role, one.evaluations) for one in maps)]
    for name in METRICS:
        values: dict[str, dict[int, np.ndarray]] = {}
        for (role, evaluations), column in zip(predictors, parts.column(name, len(predictors)).T, strict=True):
            values.setdefault(role, {})[evaluations] = column
        estimate_metric(name, values, replicates=config.replicates)
    return sum(len(one.rows) for one in maps)


WORKS: dict[Work, Callable[[Path, Config], object]] = {"report": do_report, "sheet": do_sheet, "depth": do_depth}
MODULES: dict[Work, tuple[str, ...]] = {
    "report": ("d2f_core.flow.evaluate.report",),
    "sheet": ("d2f_core.flow.generate.contact_sheet",),
    "depth": ("d2f_core.flow.depth.evaluation",),
}


def resident(name: str) -> float:
    """MB (1e6 bytes) by the kernel's record."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def measure(work: Work, folder: Path, config: Config) -> dict[str, object]:
    """Do a piece of work in this process, which has done nothing before."""
    for module in MODULES[work]:
        __import__(module)
    before, began = resident("VmRSS"), time.perf_counter()
    done = WORKS[work](folder, config)
    peak = resident("VmHWM")
    return {
        "done": done, "imported_mb": round(before), "peak_mb": round(peak),
        "bytes_per_row_over_imports": round((peak - before) * 1e6 / config.rows, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def in_a_fresh_process(work: Work, folder: Path, config: Config) -> dict[str, object]:
    sizes = ["--rows", config.rows, "--rows-per-part", config.rows_per_part, "--replicates", config.replicates]
    command = [sys.executable, "-m", "benchmarks.index_memory", "--measure", work, "--folder", folder, *sizes]
    return json.loads(subprocess.check_output(list(map(str, command)), text=True))


def main() -> None:
    config = tyro.cli(Config)
    if config.measure and config.folder:
        print(json.dumps(measure(config.measure, config.folder, config)))
        return
    if config.rows % config.rows_per_part or config.rows_per_part % len(STEPS):
        raise SystemExit(f"--rows must be a multiple of --rows-per-part, and that of {len(STEPS)}.")
    with tempfile.TemporaryDirectory(dir=config.folder) as directory:
        folder = Path(directory)
        write_index(folder, config)
        if "depth" in config.works:
            write_errors(folder, config)
        found = {work: in_a_fresh_process(work, folder, config) for work in config.works}
    results = {"rows": config.rows, "rows_per_part": config.rows_per_part, "replicates": config.replicates, **found}
    print(text := json.dumps(results, indent=1))
    if config.results:
        config.results.write_text(text + "\n")


if __name__ == "__main__":
    main()
