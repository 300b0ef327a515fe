"""Batch inference: from a prompt file to images (or latents) and an index table.

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
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from d2f_core.batch.actor_pool import map_items
from d2f_core.batch.output import IndexedOutput, IndexPart, table_file
from d2f_core.batch.run_log import RunLog
from d2f_core.data.manifest import Manifest, write_manifest
from d2f_core.flow.generate.actor import LATENTS_FILE, JobsSampler
from d2f_core.flow.generate.config import GenerateConfig, GenerateError
from d2f_core.flow.generate.plan import LATENTS, Plan, claim_output, fill_settings, make_plan
from d2f_core.flow.generate.prompts import PromptFile, checked_rows, scan_prompts
from d2f_core.flow.long_captions import cut_prompts
from d2f_core.model.artifact import DescribedModel, describe_model
from d2f_core.model.autoencoder import autoencoder_fingerprint, check_autoencoder
from d2f_core.model.caption_rules import written_rules
from d2f_core.model.text_encoder import describe_text_encoder
from d2f_core.progress import Progress
from d2f_core.storage import check_reachable, join
from d2f_core.tracking import check_tracking, pin_model, resolve_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GenerateJob:
    """A checked job that is ready to run."""

    config: GenerateConfig
    prompts: PromptFile
    model: DescribedModel
    model_uri: str
    """URI of the model, with aliases resolved to a version."""

    @cached_property
    def plan(self) -> Plan:
        """What decides the images; includes the model's hash, which may take reading all of it."""
        return make_plan(self.config, self.prompts, self.model, self.model_uri)

    @property
    def latents(self) -> dict[str, Any]:
        """Fingerprint of the latent table that the job writes instead of images."""
        plan, model, pairs = self.plan, self.model, self.config.emit == "pairs"
        return {
            "autoencoder": autoencoder_fingerprint(model.base),
            "resolution": plan.height if plan.height == plan.width else None,
            "made_by": {"model": model.content_hash, "base": model.base.content_hash, "pairs": pairs},
            **written_rules(model.base.captions),
        }


def check_generate(config: GenerateConfig) -> GenerateJob:
    """Check everything that can be checked before a cluster is used.

    Raises:
        ValueError: unusable storage, prompts, model or sampler settings; one line each.
    """
    config.check_complete()
    check_reachable(config.prompts)
    check_reachable(config.model)
    check_reachable(config.output, write=True)
    if config.model.startswith("models:/"):
        check_tracking()
    prompts = scan_prompts(config.prompts)
    pinned = pin_model(config.model)
    model = describe_model(resolve_model(pinned), base_prediction=config.base_prediction)
    fill_settings(config, prompts, model)
    check_autoencoder(model.base)
    describe_text_encoder(model.base)
    return GenerateJob(config=config, prompts=prompts, model=model, model_uri=pinned)


def generate(job: GenerateJob) -> Manifest:
    """Make all missing images; needs a running Ray. A finished output is not changed.

    Raises:
        OutputError: the output belongs to another plan.
        GenerateError: the output's index does not hold one row per image.
        InsufficientResourcesError: the cluster is too small.
        RefusedError: an actor refused the model or the prompts.
    """
    return generate_all([job])[0]


def generate_all(jobs: Sequence[GenerateJob]) -> list[Manifest]:
    """Run several jobs, one after the other, with one pool of actors, whose size is that of the first job's config.

    Raises:
        ValueError: see `generate`.
    """
    begun = [_Begun(job) for job in jobs]
    missing = [(number, chunk) for number, each in enumerate(begun) for chunk in each.output.missing]
    with contextlib.ExitStack() as logs:
        for each in begun:
            if not each.output.manifest:
                logs.enter_context(each.log)
        for result in _run(jobs, missing) if missing else ():
            begun[result["job"]].add(result)
        return [each.finish() for each in begun]


class _Begun:
    """A started job: its claimed output with the existing parts, and its MLflow run."""

    def __init__(self, job: GenerateJob) -> None:
        config, plan = job.config, job.plan
        self.job, self.output = job, claim_output(config.output, plan, job.prompts)
        if self.output.manifest:
            logger.info("%s: all %d images are there, nothing to do", config.output, self.output.manifest.num_rows)
        self.cut = {} if self.output.manifest else _cut_prompts(job)
        self.progress = Progress("generate", plan.num_images, "images", done=self.output.rows)
        tags = {
            "d2f.model": plan.model_uri,
            "d2f.model_sha256": plan.model_hash,
            "d2f.prompts": config.prompts,
            "d2f.prompts_digest": plan.prompts_digest,
        }
        self.log = RunLog(config.experiment, config.output, config, plan, tags)

    def add(self, result: dict[str, Any]) -> None:
        metadata = {LATENTS_FILE: result["latents"].encode()}
        part = IndexPart(table_file(result["part"]), result["failed"], metadata)
        self.output.add(result["chunk"], part)
        self.progress.advance(part.file.rows)
        values = {
            "images": self.progress.done, "images_per_second": self.progress.rate, "failed": self.output.failed
        }  # fmt: skip
        self.log.log(self.progress.done, values)
        if len(self.output.parts) == self.output.num_parts:
            self.finish()

    def finish(self) -> Manifest:
        return self.output.manifest or _finish(self.job, self.output, self.cut)


def _cut_prompts(job: GenerateJob) -> dict[str, int]:
    """Count, and say, which prompts the model's text encoder does not read to their end; negative ones too."""
    given = (row[name] for row in checked_rows(job.config.prompts) for name in ("prompt", "negative_prompt"))
    return cut_prompts(job.config.prompts, (text for text in given if text), job.model.base)


def _run(jobs: Sequence[GenerateJob], chunks: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """One result per (job, chunk), in order of completion."""
    config = jobs[0].config
    items = [{"job": job, "chunk": chunk} for job, chunk in chunks]
    arguments = [(job.plan, job.config.output) for job in jobs], config.cpus_per_actor
    return map_items(items, JobsSampler, arguments, config, node_wait_seconds=config.node_wait_seconds)


def _finish(job: GenerateJob, output: IndexedOutput, cut: Mapping[str, int]) -> Manifest:
    config, plan = job.config, job.plan
    if output.rows != plan.num_images:
        raise GenerateError(
            f"{config.output!r} has {output.rows} index rows for {plan.num_images} images. Remove it and run again."
        )
    inputs = {"prompts": config.prompts, "model": plan.model_uri}
    if plan.emit != "images":
        latents = (table_file(part.metadata.get(LATENTS_FILE, b"null").decode()) for part in output.in_order())
        files = tuple(file for file in latents if file)
        table = Manifest(kind="latents", files=files, fingerprint=job.latents, inputs=inputs)
        write_manifest(join(config.output, LATENTS), table)
    failed = output.failed
    counts = {"prompts": plan.num_prompts, "images": plan.num_images - failed, "failed": failed}
    manifest = output.finish(inputs, {**counts, **cut})
    logger.info("%s: %d images, %d failed", config.output, plan.num_images - failed, failed)
    return manifest
