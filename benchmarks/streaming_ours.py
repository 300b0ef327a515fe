"""Our reader, as benchmarks.streaming and benchmarks.streaming_memory run it.

    python -m benchmarks.streaming_ours '["s3://bucket/table", NUM_BATCHES, STEP_SECONDS, FIRST_SECONDS]'

A run connects to the Ray head that RAY_ADDRESS names, and prints its figures as a line of JSON.
"""

import json
import os
import sys
import time
from typing import Any

import pyarrow as pa
import ray
import torch

from benchmarks import streaming_peers as peers
from benchmarks.streaming_peers import BATCH
from d2f_core.data.arrays import arrays_to_table, table_to_arrays
from d2f_core.data.manifest import Manifest, read_manifest, write_manifest, write_part
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.schema import array_field
from d2f_core.data.stream import micro_batches, worker_shard
from d2f_core.data.stream_plan import Source, StreamPlan

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TEXTS = [pa.field(name, pa.string(), nullable=False) for name in ("sample_id", "caption")]
SCHEMA = pa.schema([*TEXTS, array_field("latent_mean", "float16", peers.SHAPE)])
BUCKET = "s3://d2f"


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


def ours(uri: str, num_batches: int, waits: list[float]) -> peers.Batches:
    """Our reader: a plan, carried out by Ray Data.

    Args:
        waits: gets the seconds that each micro-batch was waited for, which a training logs as "data wait".
    """
    manifest = read_manifest(uri)
    order = SampleOrder(num_rows=manifest.num_rows, batch=BATCH, lanes=16, window_rows=peers.SCOPE // 16)
    plan = StreamPlan(
        sources=(Source(uri=uri, order=order),),
        columns=("sample_id", "caption", "latent_mean"),
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        num_steps=num_batches,
    )
    rows = micro_batches(worker_shard(plan, rank=0, num_workers=1, first_step=0))
    asked = time.perf_counter()
    for table in rows:
        waits.append(time.perf_counter() - asked)
        arrays = table_to_arrays(table, ["sample_id", "latent_mean"])
        yield arrays["sample_id"].tolist(), torch.from_numpy(arrays["latent_mean"])
        asked = time.perf_counter()


def run_ours(uri: str, num_batches: int, step_seconds: float, first_seconds: float) -> dict[str, Any]:
    """One run in this process, connected to the Ray head that RAY_ADDRESS names."""
    names = ("AWS_ENDPOINT_URL", *ONE_THREAD)
    ray.init(log_to_driver=False, runtime_env={"env_vars": {name: os.environ[name] for name in names}})
    waits: list[float] = []
    paces = {"step_seconds": step_seconds, "first_seconds": first_seconds}
    result = peers.consume(lambda: ours(uri, num_batches, waits), **paces)
    ray.shutdown()
    return {**result, "row_waits": [round(wait, 6) for wait in waits[1:]]}


def ours_command(rows: int, num_batches: int, step_seconds: float = 0.0, first_seconds: float = 0.0) -> list[str]:
    """The arguments of `run` for a run of ours over the table of so many rows."""
    call = json.dumps([f"{BUCKET}/ours-{rows}", num_batches, step_seconds, first_seconds])
    return [sys.executable, "-m", "benchmarks.streaming_ours", call]


if __name__ == "__main__":
    print(json.dumps(run_ours(*json.loads(sys.argv[1]))), flush=True)
