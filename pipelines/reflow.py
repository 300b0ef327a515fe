"""Reflow, a workflow of rounds: `ray job submit --working-dir . -- python -m pipelines.workflow reflow`.

In every round, a teacher generates pairs of noise and latent, a model is trained to map one to the other on a straight
path, registered, and compared with its teacher and the base; the next round starts from this model. Complete stages are
skipped; after a kill, the same command resumes. Source: Liu et al., "Flow Straight and Fast", 2022, arXiv:2209.03003.
"""

import hashlib
import itertools
import json
import logging
from dataclasses import dataclass, replace

from d2f_core.data.manifest import read_manifest
from d2f_core.flow.evaluate.job import read_reference
from d2f_core.flow.generate.config import GenerateConfig
from d2f_core.flow.generate.prompts import scan_prompts, table_captions
from d2f_core.model.artifact import DESCRIPTION
from d2f_core.model.base import describe_base, described_copy
from d2f_core.model.latent_task import check_start
from d2f_core.model.sampling import DDIM_CLEAN
from d2f_core.storage import check_reachable, join, write_bytes
from d2f_core.tracking import check_tracking, pin_model, resolve_model
from pipelines import generate
from pipelines.cluster import connect
from pipelines.workflow_config import ReflowConfig
from pipelines.workflow_stages import Outputs, Workflow, evaluate_with, finetune_with, register_with

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The model that generates a round's pairs."""

    uri: str
    """URI of the model, with aliases resolved to a version."""
    digest: str
    """Content hash of the model's files."""
    start: str
    """Model that the training starts from: the teacher's URI, or "" if the teacher is the base itself."""
    solver: str | None = None
    """Solver of its pairs, if none is given; None: the teacher's own."""


def first_teacher(config: ReflowConfig) -> Teacher:
    """The teacher of the first round; raises ValueError when the training cannot start from it."""
    uri, model = pin_model(config.teacher), config.finetune.model
    place, base = resolve_model(uri), describe_base(model.base).read_as(model.base_prediction)
    if (described_copy(place).path / DESCRIPTION).exists():
        trained = check_start(base, replace(model, start=place))
        return Teacher(uri=uri, digest=trained.content_hash, start=uri)
    drawn_by = describe_base(place).read_as(model.base_prediction)
    digest = drawn_by.content_hash
    if digest != base.content_hash:
        raise ValueError(
            f"teacher={config.teacher!r} is a base with the hash {digest}; finetune.model.base={model.base!r} has "
            f"{base.content_hash}. Train the base that draws the pairs."
        )
    # A diffusion base would by default end as stock pipelines do, and the noise that this leaves would be learned.
    return Teacher(uri=uri, digest=digest, start="", solver=None if drawn_by.is_flow else DDIM_CLEAN)


def check(config: ReflowConfig) -> Teacher:
    """Refuse what cannot work before the first stage runs; returns who draws the first pairs."""
    for uri in (config.finetune.model.base, config.teacher):
        check_reachable(uri)
    check_reachable(config.output, write=True)
    check_tracking()
    read_manifest(config.captions)
    teacher = first_teacher(config)
    if config.evaluate.prompts:  # checked now, not after hours of earlier stages
        scan_prompts(config.evaluate.prompts)
        read_reference(config.evaluate)
    return teacher


def main(config: ReflowConfig) -> list[Outputs]:
    """Run all rounds; returns each round's registered version."""
    teacher = check(config)
    connect(reads={}, writes={"output": config.output})
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
    """Config for generating a round's pairs; writes their prompts. After the first round the teacher samples with its
    own defaults, because the pairs that it was trained on already include guidance."""
    place = join(config.output, f"round-{number}")
    prompts = write_captions(config, place, seed=number)
    told = "" if teacher.start else config.finetune.model.base_prediction  # a trained model says it itself
    given = {"prompts": prompts, "model": teacher.uri, "output": join(place, "pairs"), "base_prediction": told}
    drawing = replace(config.generate, **given, emit="pairs")
    if number > 1:
        return replace(drawing, guidance=None, solver=None)
    return drawing if drawing.solver else replace(drawing, solver=teacher.solver)


def write_captions(config: ReflowConfig, place: str, seed: int) -> str:
    """Write a prompt file of `num_pairs` rows, named by its content; returns its URI. Each round's seed gives its own
    noise.
    """
    captions = itertools.islice(itertools.cycle(table_captions(config.captions, config.num_pairs)), config.num_pairs)
    lines = [json.dumps({"prompt": caption, "seed": seed}) for caption in captions]
    data = ("\n".join(lines) + "\n").encode()
    uri = join(place, f"prompts-{hashlib.sha256(data).hexdigest()[:12]}.jsonl")
    write_bytes(uri, data)
    return uri
