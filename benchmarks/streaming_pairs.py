"""How fast a table of pairs streams beside a table of latents of that size, from the same server.

    python -m benchmarks.streaming_pairs --results streaming_pairs.json

Writes random rows of both to a local S3 server: pairs as `embed_pairs` stores them at the sizes of arXiv:2412.03512
(two images of 434 px, 31 x 31 tokens, 32 targets kept of each in both directions: 1.4 MB a row), and latents of 32 KiB
with a caption. Both are read through Ray Data by the reader of a training, `--epochs` times through, shuffled over 2
lanes of windows as long as a file, as one worker of eight does in the recipe `distilldift-weak`; the runs take turns. A
rate counts the bytes of arrays after the first micro-batch. The server's files are in the page cache for both.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import tyro

from benchmarks.streaming import heading, run
from benchmarks.streaming_memory import running
from benchmarks.streaming_ours import BUCKET, write_ours
from d2f_core.correspondence.targets.config import EmbedPairsConfig
from d2f_core.correspondence.targets.spec import PairsSpec, row_bytes
from d2f_core.data.arrays import arrays_to_table, table_to_arrays
from d2f_core.data.manifest import Manifest, read_manifest, write_manifest, write_part
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.schema import array_kind, is_array
from d2f_core.data.stream import micro_batches, worker_shard
from d2f_core.data.stream_plan import Source, StreamPlan

SIZE, LANES = 434, 2
LATENT_BYTES = 2 * 4 * 64 * 64
FILES = {"pairs": 64, "latents": 2_000}
"""Rows of a file, and of a window."""
BATCHES = {"pairs": 8, "latents": 80}


@dataclass(frozen=True, kw_only=True)
class Options:
    results: Path
    """File for the raw figures, JSON; written anew after every run."""
    megabytes: int = 400
    """Of each table, about."""
    epochs: int = 2
    rounds: int = 3
    run_seconds: float = 600.0
    """Time limit of a single run."""


def pairs_spec() -> PairsSpec:
    return PairsSpec(config=EmbedPairsConfig(), fingerprint={}, inputs={}, size=SIZE)


def write_pairs(uri: str, rows: int) -> None:
    spec, files, count = pairs_spec(), [], FILES["pairs"]
    schema = spec.schema()
    for first in range(0, rows, count):
        draw, columns = np.random.default_rng(first), dict[str, Any]()
        for field in schema:
            if not is_array(field):
                columns[field.name] = [f"{field.name}-{row}" for row in range(first, first + count)]
                continue
            shape, dtype = array_kind(field)
            values = draw.integers(0, 200, (count, *shape), dtype=np.uint8)  # fast, and finite as any float
            columns[field.name] = values.astype(dtype)
        name = f"part-{first:06d}.parquet"
        table = arrays_to_table(columns, schema)
        files.append(write_part(uri, name, table, row_group_rows=spec.row_group_rows))
    write_manifest(uri, Manifest(kind="pairs", files=tuple(files)))


def columns_of(kind: str) -> tuple[str, ...]:
    if kind == "latents":
        return "sample_id", "caption", "latent_mean"
    return "sample_id", *(field.name for field in pairs_spec().schema() if is_array(field))


def read_table(kind: str, uri: str, epochs: int) -> dict[str, Any]:
    """Passes over a table, in this process, connected to the Ray head that RAY_ADDRESS names."""
    ray.init(log_to_driver=False, runtime_env={"env_vars": {"AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}})
    rows, batch = read_manifest(uri).num_rows, BATCHES[kind]
    order = SampleOrder(num_rows=rows, batch=batch, lanes=LANES, window_rows=FILES[kind])
    plan = StreamPlan(
        sources=(Source(uri=uri, order=order),), columns=columns_of(kind), global_batch_size=batch,
        micro_batch_size=batch, num_steps=epochs * rows // batch,
    )  # fmt: skip
    seen, got, began, first = list[str](), 0, 0.0, 0
    for table in micro_batches(worker_shard(plan, rank=0, num_workers=1, first_step=0)):
        arrays = table_to_arrays(table, [name for name in plan.columns if is_array(table.schema.field(name))])
        got += sum(values.nbytes for values in arrays.values())
        seen += table.column("sample_id").to_pylist()
        if not began:
            began, first = time.perf_counter(), got
    seconds = time.perf_counter() - began
    ray.shutdown()
    complete = len(seen) == epochs * rows and len(set(seen)) == rows
    return {"bytes": got, "rate": (got - first) / seconds, "complete": complete, "rows": len(seen)}


def main(options: Options) -> None:
    runs: list[dict[str, Any]] = []
    wide = row_bytes(list(pairs_spec().schema()))
    pairs = max(1, round(options.megabytes * 1e6 / wide / FILES["pairs"])) * FILES["pairs"]
    latents = max(1, round(pairs * wide / LATENT_BYTES / FILES["latents"])) * FILES["latents"]
    report = {**heading(options), "row_bytes": wide, "rows": {"pairs": pairs, "latents": latents}, "runs": runs}
    uris = {"pairs": f"{BUCKET}/pairs-{pairs}", "latents": f"{BUCKET}/latents-{latents}"}
    with tempfile.TemporaryDirectory() as directory, running(directory):
        write_pairs(uris["pairs"], pairs)
        write_ours(uris["latents"], latents)
        for number in range(options.rounds):
            for kind, uri in uris.items():
                call = json.dumps([kind, uri, options.epochs])
                argv = [sys.executable, "-m", "benchmarks.streaming_pairs", call]
                runs.append(
                    {"round": number, "kind": kind, **run(argv, os.environ["AWS_ENDPOINT_URL"], options.run_seconds)}
                )
                options.results.write_text(json.dumps(report, indent=1, default=str) + "\n")
                one = runs[-1]
                print(f"{kind:<8} {one['rate'] / 1e6:6.0f} MB/s  complete: {one['complete']}", flush=True)
    rates = {kind: [one["rate"] for one in runs if one["kind"] == kind] for kind in uris}
    ratios = [one / other for one, other in zip(rates["pairs"], rates["latents"], strict=True)]
    middle = {kind: statistics.median(values) / 1e6 for kind, values in rates.items()}
    print(
        f"pairs {middle['pairs']:.0f} MB/s, latents {middle['latents']:.0f} MB/s; pairs / latents "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("["):
        print(json.dumps(read_table(*json.loads(sys.argv[1]))), flush=True)
    else:
        main(tyro.cli(Options))
