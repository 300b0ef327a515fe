"""Reflow, a workflow of rounds: `ray job submit --working-dir . -- python -m pipelines.workflow reflow`.

In every round a model draws pairs of noise and latent, is trained to go from one to the other on a straight line, is
registered, and is measured beside its teacher and the base; the next round begins with it. What is complete is skipped;
after a kill the same command goes on.
Source: Liu et al., "Flow Straight and Fast", 2022, arXiv:2209.03003.
"""

import hashlib
import itertools
import json
import logging
from dataclasses import dataclass, replace

import ray

from d2f_core.data.manifest import read_manifest
from d2f_core.flow.evaluate.job import read_reference
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.generate.prompts import scan_prompts, table_captions
from d2f_core.model.artifact import DESCRIPTION
from d2f_core.model.base import local_copy, resolve_base
from d2f_core.model.latent_task import check_start
from d2f_core.storage import check_reachable, join, write_bytes
from d2f_core.tracking import check_tracking, pin_model, resolve_model
from pipelines import generate
from pipelines.workflow_config import ReflowConfig
from pipelines.workflow_stages import Outputs, Workflow, evaluate_with, finetune_with, register_with

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Who draws a round's pairs."""

    uri: str
    """Pinned: never an alias."""
    digest: str
    """Of its files."""
    start: str
    """What the training begins with: the teacher, or nothing where it is the base itself."""


def first_teacher(config: ReflowConfig) -> Teacher:
    """Raises ValueError when the training cannot begin with what the teacher knows."""
    uri, model = pin_model(config.teacher), config.finetune.model
    place, base = resolve_model(uri), resolve_base(model.base)
    if (local_copy(place) / DESCRIPTION).exists():
        trained = check_start(base, replace(model, start=place))
        return Teacher(uri=uri, digest=trained.content_hash, start=uri)
    digest = resolve_base(place).content_hash
    if digest != base.content_hash:
        raise ValueError(
            f"teacher={config.teacher!r} is a base with the hash {digest}; finetune.model.base={model.base!r} has "
            f"{base.content_hash}. Train the base that draws the pairs."
        )
    return Teacher(uri=uri, digest=digest, start="")


def check(config: ReflowConfig) -> Teacher:
    """Refuse what cannot work before the first stage runs; returns who draws the first pairs."""
    for uri in (config.finetune.model.base, config.teacher):
        check_reachable(uri)
    check_reachable(config.output, write=True)
    check_tracking()
    read_manifest(config.captions)
    teacher = first_teacher(config)
    if config.evaluate.prompts:  # what the last stage needs is missed before the first one has run for hours
        scan_prompts(config.evaluate.prompts)
        read_reference(config.evaluate)
    return teacher


def main(config: ReflowConfig) -> list[Outputs]:
    """All rounds; returns each one's registered version."""
    teacher = check(config)
    ray.init(ignore_reinit_error=True)
    flow, versions = Workflow(config.output), []
    for number in range(1, config.rounds + 1):
        version = run_round(flow, config, number, teacher)
        teacher = Teacher(uri=version["uri"], digest=version["digest"], start=version["uri"])
        versions.append(version)
    return versions


def run_round(flow: Workflow, config: ReflowConfig, number: int, teacher: Teacher) -> Outputs:
    place = join(config.output, f"round-{number}")
    drawing = drawing_of(config, number, teacher)
    pairs = flow.table(f"pairs_{number}", "pairs", generate.main, drawing, teacher=teacher.digest)
    training = replace(
        config.finetune,
        latents=join(drawing.output, "latents"),
        output=join(place, "run"),
        model=replace(config.finetune.model, start=teacher.start),
        name=f"{config.finetune.name}-round-{number}",
    )
    model = finetune_with(flow, f"finetune_{number}", training, pairs=pairs["digest"])
    version = register_with(flow, f"register_{number}", config.register, training, model)
    if config.evaluate.prompts:
        measuring = replace(
            config.evaluate,
            candidate=version["uri"],
            champion=teacher.start,
            output=join(place, "evaluation"),
        )
        evaluate_with(flow, f"evaluate_{number}", measuring, version)
    return version


def drawing_of(config: ReflowConfig, number: int, teacher: Teacher) -> GenerateConfig:
    """The pairs of a round, whose prompts are written. After the first the teacher samples as it carries it: guidance
    is in the pairs that it was trained on."""
    place = join(config.output, f"round-{number}")
    prompts = write_captions(config, place, seed=number)
    drawing = replace(config.generate, prompts=prompts, model=teacher.uri, output=join(place, "pairs"), emit="pairs")
    return drawing if number == 1 else replace(drawing, guidance=None, solver=None)


def write_captions(config: ReflowConfig, place: str, seed: int) -> str:
    """A prompt file of `num_pairs` rows, named by its content; each round draws from noises of its own."""
    captions = itertools.islice(itertools.cycle(table_captions(config.captions, config.num_pairs)), config.num_pairs)
    lines = [json.dumps({"prompt": caption, "seed": seed}) for caption in captions]
    data = ("\n".join(lines) + "\n").encode()
    uri = join(place, f"prompts-{hashlib.sha256(data).hexdigest()[:12]}.jsonl")
    write_bytes(uri, data)
    return uri
