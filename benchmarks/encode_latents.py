"""How much of the autoencoder's own speed encode_latents delivers, once its actors are up.

    python -m benchmarks.encode_latents --images 7616 --rounds 3 --json encode_latents.json

Measured side by side, in turn, in every round:
    job     the Ray Data job (read, check, decode, encode, write), the second half of its chunks as they are written
    bare    `vae.encode` in one process with as many threads as the job's actors together, over tensors in memory
    again   the same once more: what `bare / again` spreads is the finest difference that can be claimed
    split   `vae.encode` in one process per actor, with one actor's threads each
The first half is left out because chunks pile up while the writing tasks start, and would then count as fast work.
Both sides encode the same pixels in the same batch size, and their latents are compared before anything is printed.
"""

import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
import tyro

from d2f_core.batch.chunk_records import unfinished_shards
from d2f_core.batch.table_job import claim_output, finish_table, make_table, run_chunks
from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.datasets.config import MakeDatasetConfig
from d2f_core.data.datasets.emoji import make_dataset
from d2f_core.data.images import prepare_image
from d2f_core.data.manifest import write_part
from d2f_core.data.schema import IMAGE_SCHEMA
from d2f_core.data.sources.config import ImageSource
from d2f_core.data.sources.images import plan_images
from d2f_core.data.table_reader import RowReader
from d2f_core.flow.encode.actor import to_input
from d2f_core.flow.encode.check import check_encode
from d2f_core.flow.encode.config import EncodeConfig
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import resolve_base
from d2f_core.storage import join

TOLERANCE = 4e-3
"""Of latents of order 1 in half precision, encoded in batches of other neighbours."""


@dataclass(frozen=True, kw_only=True)
class Options:
    base: str = "infra/models/emoji-sd"
    """Base model with the autoencoder."""
    place: str | None = None
    """Where images and latents are written, s3:// or local; None: a temporary directory."""
    images: int = 7616
    """Images to encode: emoji of both styles, again with other captions when there are not enough."""
    resolution: int = 64
    rounds: int = 3
    batch_size: int = 16
    rows_per_part: int = 64
    num_actors: int = 2
    cpus_per_actor: int = 1
    json: str | None = None
    """File for the raw figures."""


def bare_rate(base: str, pixels: np.ndarray, threads: int, batch_size: int, means: Any, ready: Any) -> None:
    """Encode resident tensors; puts (seconds, means) into the queue after all processes are `ready`."""
    torch.set_num_threads(threads)
    autoencoder = load_autoencoder(resolve_base(base))
    batches = [to_input(pixels[start : start + batch_size], "cpu") for start in range(0, len(pixels), batch_size)]
    for batch in batches[:3]:
        autoencoder.encode(batch)
    ready.wait()
    begun = time.perf_counter()
    results = [autoencoder.encode(batch)[0] for batch in batches]
    seconds = time.perf_counter() - begun
    means.put((seconds, torch.cat(results).half().numpy()))


def run_bare(options: Options, pixels: np.ndarray, processes: int, threads: int) -> tuple[float, np.ndarray]:
    """Images per second, and the means in no certain order of processes."""
    context = multiprocessing.get_context("spawn")
    means, ready = context.Queue(), context.Barrier(processes)
    shares = np.array_split(pixels, processes)
    workers = [
        context.Process(target=bare_rate, args=(options.base, share, threads, options.batch_size, means, ready))
        for share in shares
    ]
    for worker in workers:
        worker.start()
    results = [means.get() for _ in workers]
    for worker in workers:
        worker.join()
    return len(pixels) / max(seconds for seconds, _ in results), np.concatenate([values for _, values in results])


def run_encode_job(options: Options, images: str, output: str) -> tuple[float, float, EncodeConfig]:
    """Images per second once started, seconds until the first chunk was written, and the job that was run."""
    config = EncodeConfig(
        source=ImageSource(uri=images),
        base=options.base,
        output=output,
        resolution=options.resolution,
        rows_per_part=options.rows_per_part,
        batch_size=options.batch_size,
        num_actors=options.num_actors,
        cpus_per_actor=options.cpus_per_actor,
    )
    begun = time.perf_counter()
    job = check_encode(config)
    claim_output(job.spec)
    arrivals = []
    records = []
    for record in run_chunks(job, unfinished_shards(len(job.source.shards), ())):
        arrivals.append((time.perf_counter(), record.read))
        records.append(record)
    finish_table(job.spec, records)
    half = len(arrivals) // 2
    rows = sum(read for _, read in arrivals[half + 1 :])
    return rows / (arrivals[-1][0] - arrivals[half][0]), arrivals[0][0] - begun, config


def write_images(options: Options, uri: str) -> np.ndarray:
    """Emoji as one parquet file; returns the pixels that the job will encode, in its order."""
    make_dataset(MakeDatasetConfig(output=join(uri, "all"), style="both", size=options.resolution, subset="all"))
    samples = [sample for shard in plan_images(ImageSource(uri=join(uri, "all"))).shards for sample in shard.read()]
    chosen = [samples[number % len(samples)] for number in range(options.images)]
    rows = [
        {
            "sample_id": str(n),
            "caption": f"{sample.caption} {n}",
            "image": sample.image,
            "source_uri": sample.source_uri,
        }
        for n, sample in enumerate(chosen)
    ]
    write_part(join(uri, "images"), "part-0.parquet", pa.Table.from_pylist(rows, IMAGE_SCHEMA))
    rules = EncodeConfig(resolution=options.resolution, rows_per_part=options.rows_per_part).rules
    return np.stack([prepare_image(sample.image or b"", rules).pixels for sample in chosen])


def check_same_work(config: EncodeConfig, means: np.ndarray) -> float:
    """Largest difference between both sides' latents.

    Raises:
        RuntimeError: they are not the same; the figures are void.
    """
    manifest = make_table(check_encode(config))
    rows = RowReader(config.output, manifest, ["latent_mean"]).read(np.arange(manifest.num_rows))
    job = table_to_arrays(rows)["latent_mean"].astype("f4")
    means = means.astype("f4")
    if job.shape != means.shape:
        raise RuntimeError(f"The job wrote latents {job.shape}, the loop {means.shape}. The figures are void.")
    difference = float(np.abs(job - means).max())
    if difference > TOLERANCE * max(1.0, float(np.abs(means).max())):
        raise RuntimeError(f"The latents of job and loop differ by {difference}. The figures are void.")
    return difference


def measure(options: Options, place: str) -> dict[str, Any]:
    """All rounds' raw rates in images per second."""
    pixels = write_images(options, place)
    threads = options.num_actors * options.cpus_per_actor
    rates: dict[str, list[float]] = {"job": [], "bare": [], "again": [], "split": [], "start_seconds": []}
    difference = 0.0
    for number in range(options.rounds):
        rate, start, config = run_encode_job(options, join(place, "images"), join(place, f"latents-{number}"))
        rates["job"].append(rate)
        rates["start_seconds"].append(start)
        bare, means = run_bare(options, pixels, 1, threads)
        rates["bare"].append(bare)
        rates["again"].append(run_bare(options, pixels, 1, threads)[0])
        rates["split"].append(run_bare(options, pixels, options.num_actors, options.cpus_per_actor)[0])
        difference = max(difference, check_same_work(config, means))
        print(f"round {number}: " + ", ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items()), flush=True)
    return {"rates": rates, "largest_difference": difference}


def summarize(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, lowest and highest of the rounds' ratios."""
    pairs = {"job / bare": ("job", "bare"), "job / split": ("job", "split"), "bare / again": ("bare", "again")}
    ratios = {name: [a / b for a, b in zip(rates[x], rates[y], strict=True)] for name, (x, y) in pairs.items()}
    return {name: {"median": statistics.median(r), "low": min(r), "high": max(r)} for name, r in ratios.items()}


def main(options: Options) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(options.cpus_per_actor))
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        ray.init(address="local", num_cpus=options.num_actors * options.cpus_per_actor + 4, include_dashboard=False)
    with tempfile.TemporaryDirectory() as directory:
        figures = measure(options, options.place or directory)
    figures["summary"] = summarize(figures["rates"])
    figures["options"], figures["command"] = asdict(options), " ".join(sys.argv)
    figures["machine"] = f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}"
    print(f"\n{'ratio':<14}{'median':>8}{'low':>8}{'high':>8}")
    for name, row in figures["summary"].items():
        print(f"{name:<14}{row['median']:>8.3f}{row['low']:>8.3f}{row['high']:>8.3f}")
    print(f"largest difference of the latents: {figures['largest_difference']:.1e}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
