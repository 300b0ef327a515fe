"""Batch inference: a prompt file in, images and an index table out.

    OUTPUT/plan.json                        what decides the images; a second job with another plan is refused
    OUTPUT/prompts.parquet                  the checked prompts, cut into chunks
    OUTPUT/images/{sample_id}-{steps}.png
    OUTPUT/index/part-*.parquet             one row per image: every setting used, or why there is no image
    OUTPUT/manifest.json                    written last

Each image's noise is a function of (seed, sample_id): it is the same on any cluster, for any number of steps, and for
any model with latents of that shape.
"""

import hashlib
import logging
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from d2f_core.data.manifest import Manifest, TableFile, manifest_exists, read_manifest, write_manifest
from d2f_core.inference.plan import (
    GenerateConfig,
    GenerateError,
    Plan,
    chunks_done,
    claim_output,
    make_plan,
    part_name,
    refuse_other,
)
from d2f_core.inference.prompts import read_prompts
from d2f_core.inference.sampler import ChunkSampler
from d2f_core.model.artifact import load_model
from d2f_core.progress import Progress
from d2f_core.storage import check_reachable, join, read_bytes
from d2f_core.tracking import check_tracking, pin_model, resolve_model

logger = logging.getLogger(__name__)

KIND = "generations"
READ_THREADS = 8
MAX_INPUT_BLOCKS = 1000
RESOURCE_WAIT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class GenerateJob:
    """A job that was checked, and is ready to run."""

    config: GenerateConfig
    prompts: pa.Table
    plan: Plan


def check_generate(config: GenerateConfig) -> GenerateJob:
    """Check everything that can be checked before a cluster is used.

    Raises:
        ValueError: unusable storage, prompts, model or sampler settings; one line each.
    """
    config.check_complete()
    check_reachable(config.prompts, write=False)
    check_reachable(config.output, write=True)
    if config.model.startswith("models:/"):
        check_tracking()
    prompts = read_prompts(config.prompts)
    pinned = pin_model(config.model)
    plan = make_plan(config, prompts, load_model(resolve_model(pinned)), pinned)
    return GenerateJob(config=config, prompts=prompts, plan=plan)


def generate(job: GenerateJob) -> Manifest:
    """Make all images that are not there yet; needs a running Ray. A finished output is left alone.

    Raises:
        GenerateError: the output belongs to another plan, or the cluster is too small.
    """
    config, plan = job.config, job.plan
    claim_output(config.output, plan, job.prompts)
    if manifest_exists(config.output):
        manifest = read_manifest(config.output)
        refuse_other(config.output, plan.identity(), manifest.fingerprint)
        logger.info("%s: all %d images are there, nothing to do", config.output, manifest.num_rows)
        return manifest
    done = chunks_done(config.output, plan)
    missing = [chunk for chunk in range(plan.num_chunks) if chunk not in done]
    images_done = sum(len(plan.rows_of(chunk)) for chunk in done) * len(plan.steps)
    progress = Progress("generate", plan.num_images, "images", done=images_done)
    parts: dict[int, TableFile] = {}
    for result in _run(config, plan, missing) if missing else ():
        part = result["part"]
        parts[result["chunk"]] = TableFile(**{**part, "row_groups": tuple(part["row_groups"])})
        progress.advance(part["rows"])
    with ThreadPoolExecutor(READ_THREADS) as pool:
        parts.update(zip(done, pool.map(lambda chunk: _describe_part(config.output, chunk), done), strict=True))
    return _finish(config, plan, [parts[chunk] for chunk in range(plan.num_chunks)])


def _run(config: GenerateConfig, plan: Plan, chunks: list[int]) -> Iterator[dict[str, Any]]:
    """One result per chunk, as they come."""
    actors = min(config.num_actors, len(chunks))
    _await_resources(actors, config)
    blocks = min(len(chunks), MAX_INPUT_BLOCKS)
    dataset = ray.data.from_items([{"chunk": chunk} for chunk in chunks], override_num_blocks=blocks)
    dataset.context.enable_progress_bars = sys.stderr.isatty()
    dataset.context.print_on_execution_start = False
    dataset = dataset.map_batches(
        ChunkSampler,
        fn_constructor_args=(plan, config.output, config.cpus_per_actor),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor or None,
    )
    yield from dataset.iter_rows()


def _await_resources(actors: int, config: GenerateConfig) -> None:
    """Wait until one actor fits; say so when not all do.

    Raises:
        GenerateError: after a minute there is still no place for a single one.
    """
    needed = {"CPU": config.cpus_per_actor, "GPU": config.gpus_per_actor}
    deadline = time.monotonic() + RESOURCE_WAIT_SECONDS
    while True:
        there = ray.cluster_resources()
        fit = min(int(there.get(name, 0) // each) for name, each in needed.items() if each)
        if fit >= 1 or time.monotonic() >= deadline:
            break
        time.sleep(1)
    has = ", ".join(f"{there.get(name, 0):g} {name}" for name, each in needed.items() if each)
    wants = ", ".join(f"{each:g} {name}" for name, each in needed.items() if each)
    if fit < 1:
        raise GenerateError(f"An actor needs {wants}, and the cluster has {has}. Lower cpus_per_actor, or add nodes.")
    if fit < actors:
        logger.warning("num_actors=%d of %s each; the cluster has %s: %d run until it grows", actors, wants, has, fit)


def _describe_part(output: str, chunk: int) -> TableFile:
    """The entry of a part that an earlier run wrote."""
    name = part_name(chunk)
    data = read_bytes(join(output, name))
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    groups = tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
    digest = hashlib.sha256(data).hexdigest()
    return TableFile(path=name, rows=metadata.num_rows, size=len(data), sha256=digest, row_groups=groups)


def _finish(config: GenerateConfig, plan: Plan, files: list[TableFile]) -> Manifest:
    index = _read_files(config.output, files)
    failed = index.num_rows - index["error"].null_count
    if index.num_rows != plan.num_images:
        raise GenerateError(
            f"{config.output!r} has {index.num_rows} index rows for {plan.num_images} images. Remove it and run again."
        )
    manifest = Manifest(
        kind=KIND,
        files=tuple(files),
        fingerprint=plan.identity(),
        inputs={"prompts": config.prompts, "model": plan.model_uri},
        counts={"prompts": plan.num_prompts, "images": plan.num_images - failed, "failed": failed},
    )
    write_manifest(config.output, manifest)
    logger.info("%s: %d images, %d failed", config.output, plan.num_images - failed, failed)
    return manifest


def read_generations(uri: str) -> pa.Table:
    """The index of a finished generation job, in prompt order within each chunk and number of steps."""
    return _read_files(uri, list(read_manifest(uri).files))


def _read_files(uri: str, files: list[TableFile]) -> pa.Table:
    with ThreadPoolExecutor(READ_THREADS) as pool:
        parts = pool.map(lambda file: pq.read_table(pa.BufferReader(read_bytes(join(uri, file.path)))), files)
        return pa.concat_tables(parts)
