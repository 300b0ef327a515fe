"""Estimates what a distillation needs before it is started: memory by ZeRO stage, hours and storage. Needs no weights
and no cluster.

Bytes and operations are counted on the architectures; the share of a GPU's peak that is reached is an assumption.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from d2f_core.correspondence.estimate.config import EstimateDistillConfig
from d2f_core.correspondence.estimate.counting import (
    TeacherCount,
    count_teacher,
    given_pairs_pass,
    loss_pass,
    student_on_meta,
    student_pass,
)
from d2f_core.correspondence.student import patch_size
from d2f_core.correspondence.targets.config import EmbedPairsConfig
from d2f_core.correspondence.targets.spec import PairsSpec, row_bytes
from d2f_core.model import footprint
from d2f_core.train.memory import RUNTIME_BYTES
from d2f_core.train.memory_table import ByStage, memory_by_stage, memory_table
from d2f_core.train.precision import DTYPES

TEXT_BYTES = 200
"""Assumed bytes of one row's names."""


@dataclass(frozen=True, kw_only=True)
class DistillEstimate:
    total: int
    """Parameters of the student."""
    trained: int
    teachers: Mapping[str, TeacherCount]
    memory: ByStage
    embed_hours: float
    """Hours in which all workers together embed the images."""
    train_hours: float
    row_bytes: int
    """Of an image and its teachers' features."""
    pair_bytes: int
    """Of a row of the table of pairs; 0: there is none."""
    checkpoint_bytes: int
    forward_flops: float
    """Of the student on one image."""
    pass_flops: float
    """Of one row, an image or a given pair, in training: forward, backward and its share of the losses."""


def estimate(config: EstimateDistillConfig) -> DistillEstimate:
    """Count memory and operations, and derive the rest from them.

    Raises:
        ValueError: an architecture is not known, or a size is no multiple of its patch.
    """
    train = config.train
    student = student_on_meta(config.matcher)
    patch = patch_size(student)
    side, rest = divmod(config.size, patch)
    if rest:
        raise ValueError(f"size={config.size} must be a multiple of the student's patch of {patch} pixels.")
    trained, frozen = footprint.sizes(student, trained=True), footprint.sizes(student, trained=False)
    images, width = config.images_per_pass, int(student.config.hidden_size)  # type: ignore[union-attr, arg-type]
    passed = student_pass(student, batch=images, size=config.size, dtype=DTYPES[train.precision])
    teachers = {teacher.name: count_teacher(teacher) for teacher in config.teachers}
    feature_bytes = sum(each.feature_bytes for each in teachers.values())
    grid = (side, side)
    loss = (
        given_pairs_pass(config.matcher, channels=width, grid=grid, pairs=config.pairs_per_pass)
        if config.pairs
        else loss_pass(config.matcher, list(teachers.values()), channels=width, grid=grid, images=images)
    )
    rate, steps = config.flops_per_hour(train.num_workers), train.num_steps * train.global_batch_size
    row = (passed.flops + loss.flops) / train.micro_batch_size
    pair_bytes = TEXT_BYTES + stored_bytes(config, patch) if config.pairs else 0
    return DistillEstimate(
        total=sum(trained) + sum(frozen),
        trained=sum(trained),
        teachers=teachers,
        memory=memory_by_stage(
            train, trained, frozen,
            activations=passed.peak_bytes + loss.peak_bytes,
            others=RUNTIME_BYTES * train.use_gpu,
        ),
        embed_hours=config.images * sum(each.flops for each in teachers.values()) / rate,
        train_hours=steps * row / rate,
        row_bytes=TEXT_BYTES + 3 * config.size**2 + feature_bytes,
        pair_bytes=pair_bytes,
        checkpoint_bytes=sum(trained) * (16 if train.ema.decay else 12),
        forward_flops=passed.forward_flops / images,
        pass_flops=row,
    )  # fmt: skip


def stored_bytes(config: EstimateDistillConfig, patch: int) -> int:
    """Bytes of the arrays in a row of the table of pairs."""
    made = EmbedPairsConfig(targets=config.targets, patch=patch)
    return row_bytes(list(PairsSpec(config=made, size=config.size, fingerprint={}, inputs={}).schema()))


def report(config: EstimateDistillConfig, found: DistillEstimate) -> str:
    """The estimate as Markdown; 1 GB is 1e9 bytes."""
    train, student = config.train, config.matcher.student
    kept = train.keep_checkpoints + train.keep_best
    title = (
        f"{student.base}: {found.trained / 1e6:.2f} M of {found.total / 1e6:.1f} M parameters are trained; "
        f"{train.precision}, {config.size} px, micro-batch {train.micro_batch_size} ({config.pairs_per_pass} pairs), "
        f"{train.num_workers} workers"
    )
    costs = [
        f"- {name}: {each.flops / 1e12:.2f} TFLOP per image, {each.flops / found.forward_flops:.1f} times the "
        f"student's {found.forward_flops / 1e12:.3f}; {each.grid[0]} x {each.grid[1]} x {each.channels} features, "
        f"{each.feature_bytes / 1e6:.2f} MB"
        for name, each in found.teachers.items()
    ]
    pairs = (
        f"{found.pair_bytes / 1e6:.2f} MB a pair, {config.pairs * found.pair_bytes / 1e9:.1f} GB the table of pairs; "
        if config.pairs
        else ""
    )
    unit = "pairs" if config.pairs else "images"
    times = [
        config.assumption(),
        f"- embedding {config.images} images: {config.span(found.embed_hours, 2)} h; {train.num_steps} steps of "
        f"{train.global_batch_size} {unit}, {found.pass_flops / 1e12:.2f} TFLOP each: "
        f"{config.span(found.train_hours, 2)} h.",
        f"- {config.cost(found.train_hours * train.num_workers, train.num_steps * train.global_batch_size)}",
        f"- storage: {found.row_bytes / 1e6:.2f} MB an image, {config.images * found.row_bytes / 1e9:.1f} GB the table "
        f"of features; {pairs}{found.checkpoint_bytes / 1e6:.1f} MB a checkpoint, {kept} kept.",
    ]
    table = memory_table(found.memory, chosen=train.zero_stage, gpu=config.gpu)
    return "\n".join([title, "", *table, "", "Teachers:", *costs, "", *times])
