"""Batch inference: a prompt file in, images (or latents) and an index table out.

    OUTPUT/plan.json                        what decides the images; a second job with another plan is refused
    OUTPUT/prompts.parquet                  the checked prompts, cut into chunks
    OUTPUT/images/{sample_id}-{steps}.png   or .webp, .jpeg
    OUTPUT/latents/                         instead of images: a latent table, with the noises when pairs were asked for
    OUTPUT/index/part-*.parquet             one row per image: every setting used, or why there is no image
    OUTPUT/timing/part-*.parquet            seconds and host of each, the only thing that differs between two runs
    OUTPUT/manifest.json                    written last

Each image's noise is a function of (seed, sample_id): it is the same on any cluster, for any number of steps, and for
any model with latents of that shape.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from d2f_core.batch.actor_pool import map_items
from d2f_core.batch.output import KIND, IndexPart, parts_there, refuse_other, table_file
from d2f_core.data.manifest import (
    Manifest,
    TableFile,
    manifest_exists,
    read_manifest,
    write_manifest,
)
from d2f_core.flow.generate.actor import LATENTS_FILE, JobsSampler
from d2f_core.flow.generate.config import GenerateConfig, GenerateError
from d2f_core.flow.generate.plan import LATENTS, Plan, claim_output, make_plan
from d2f_core.flow.generate.prompts import PromptFile, scan_prompts
from d2f_core.model.artifact import load_model
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.progress import Progress
from d2f_core.storage import check_reachable, join
from d2f_core.tracking import MetricLog, RunHandle, check_tracking, pin_model, resolve_model, start_run

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class GenerateJob:
    """A job that was checked, and is ready to run."""

    config: GenerateConfig
    prompts: PromptFile
    plan: Plan
    latents: dict[str, Any]
    """Fingerprint of the latent table that the job writes instead of images."""


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
    prompts = scan_prompts(config.prompts)
    pinned = pin_model(config.model)
    model = load_model(resolve_model(pinned))
    plan = make_plan(config, prompts, model, pinned)
    latents = {
        "autoencoder": autoencoder_fingerprint(model.base),
        "resolution": plan.height if plan.height == plan.width else None,
        "made_by": {"model": model.content_hash, "base": model.base.content_hash, "pairs": config.emit == "pairs"},
    }
    return GenerateJob(config=config, prompts=prompts, plan=plan, latents=latents)


def generate(job: GenerateJob) -> Manifest:
    """Make all images that are not there yet; needs a running Ray. A finished output is left alone.

    Raises:
        GenerateError: the output belongs to another plan.
        InsufficientResourcesError: the cluster is too small.
    """
    return generate_all([job])[0]


def generate_all(jobs: Sequence[GenerateJob]) -> list[Manifest]:
    """The same for several jobs, one after the other, by one pool of actors: the first job's config says how many.

    Raises:
        GenerateError: as `generate`.
    """
    begun = [_Begun(job) for job in jobs]
    missing = [(number, chunk) for number, each in enumerate(begun) for chunk in each.missing()]
    with contextlib.ExitStack() as reports:
        for each in begun:
            if not each.manifest:
                reports.enter_context(each.report)
        for result in _run(jobs, missing) if missing else ():
            begun[result["job"]].add(result)
        return [each.manifest or each.finish() for each in begun]


class _Begun:
    """A job whose output is claimed, and which of its chunks are there."""

    def __init__(self, job: GenerateJob) -> None:
        config, plan = job.config, job.plan
        self.job, self.parts = job, dict[int, Part]()
        claim_output(config.output, plan, job.prompts)
        self.manifest = read_manifest(config.output) if manifest_exists(config.output) else None
        if self.manifest:
            refuse_other(config.output, self.manifest.fingerprint, plan.identity())
            logger.info("%s: all %d images are there, nothing to do", config.output, self.manifest.num_rows)
        else:
            there = parts_there(config.output, plan.num_chunks)
            self.parts = {chunk: Part.from_index(part) for chunk, part in there.items()}
        self.failed = sum(part.failed for part in self.parts.values())
        images = sum(part.index.rows for part in self.parts.values())
        self.progress = Progress("generate", plan.num_images, "images", done=images)
        self.report = _Report(config, plan, self.progress)

    def missing(self) -> list[int]:
        if self.manifest:
            return []
        return [chunk for chunk in range(self.job.plan.num_chunks) if chunk not in self.parts]

    def add(self, result: dict[str, Any]) -> None:
        part = Part.from_result(result)
        self.parts[result["chunk"]] = part
        self.progress.advance(part.index.rows)
        self.failed += part.failed
        self.report.advance(self.failed)
        if len(self.parts) == self.job.plan.num_chunks:
            self.manifest = self.finish()

    def finish(self) -> Manifest:
        return _finish(self.job, [self.parts[chunk] for chunk in range(self.job.plan.num_chunks)])


@dataclass(frozen=True)
class Part:
    """What a chunk left on storage."""

    index: TableFile
    latents: TableFile | None
    failed: int

    @classmethod
    def from_result(cls, result: dict[str, Any]) -> "Part":
        return cls(table_file(result["part"]), table_file(result["latents"]), result["failed"])

    @classmethod
    def from_index(cls, part: IndexPart) -> "Part":
        return cls(part.file, table_file(part.metadata.get(LATENTS_FILE, b"null").decode()), part.failed)


class _Report:
    """The job's own MLflow run, where there is a server: what it makes, from what, and how far it is."""

    def __init__(self, config: GenerateConfig, plan: Plan, progress: Progress) -> None:
        self._config, self._plan, self._progress = config, plan, progress
        self._run: RunHandle | None = None
        self._log: MetricLog | None = None

    def __enter__(self) -> "_Report":
        if self._config.experiment and os.environ.get("MLFLOW_TRACKING_URI"):
            self._run = start_run(
                experiment=self._config.experiment,
                run_key=self._config.output,
                name=self._config.output.rstrip("/").rsplit("/", 1)[-1],
                config_yaml=yaml.safe_dump(json.loads(json.dumps(asdict(self._config))), sort_keys=False),
                params=asdict(self._plan),
                tags={
                    "d2f.model": self._plan.model_uri,
                    "d2f.model_sha256": self._plan.model_hash,
                    "d2f.prompts": self._config.prompts,
                    "d2f.prompts_digest": self._plan.prompts_digest,
                    "d2f.output": self._config.output,
                },
            )
            self._log = MetricLog(self._run)
            logger.info("MLflow run: %s", self._run.url)
        return self

    def advance(self, failed: int) -> None:
        if self._log:
            done = {"images": self._progress.done, "images_per_second": self._progress.rate, "failed": failed}
            self._log.log(self._progress.done, done)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._run and self._log:
            self._log.close(FLUSH_SECONDS)
            self._run.finish("FAILED" if kind else "FINISHED")


def _run(jobs: Sequence[GenerateJob], chunks: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """One result per (job, chunk), as they come."""
    config = jobs[0].config
    items = [{"job": job, "chunk": chunk} for job, chunk in chunks]
    arguments = [(job.plan, job.config.output) for job in jobs], config.cpus_per_actor
    return map_items(items, JobsSampler, arguments, config, node_wait_seconds=config.node_wait_seconds)


def _finish(job: GenerateJob, parts: list[Part]) -> Manifest:
    config, plan = job.config, job.plan
    rows, failed = sum(part.index.rows for part in parts), sum(part.failed for part in parts)
    if rows != plan.num_images:
        raise GenerateError(
            f"{config.output!r} has {rows} index rows for {plan.num_images} images. Remove it and run again."
        )
    inputs = {"prompts": config.prompts, "model": plan.model_uri}
    if plan.emit != "images":
        files = tuple(part.latents for part in parts if part.latents)
        latents = Manifest(kind="latents", files=files, fingerprint=job.latents, inputs=inputs)
        write_manifest(join(config.output, LATENTS), latents)
    manifest = Manifest(
        kind=KIND,
        files=tuple(part.index for part in parts),
        fingerprint=plan.identity(),
        inputs=inputs,
        counts={"prompts": plan.num_prompts, "images": plan.num_images - failed, "failed": failed},
    )
    write_manifest(config.output, manifest)
    logger.info("%s: %d images, %d failed", config.output, plan.num_images - failed, failed)
    return manifest
