"""Checks an embedding job and makes its specification before it starts; no weights are loaded."""

import dataclasses
import json
from typing import Any, cast

import torch

from d2f_core.batch.table_job import TableJob, check_output
from d2f_core.correspondence.diffusion_teacher import described_shape
from d2f_core.correspondence.embed import source
from d2f_core.correspondence.embed.actor import Embedder, build_teacher
from d2f_core.correspondence.embed.config import EmbedConfig, EmbedError, TeacherConfig
from d2f_core.correspondence.embed.spec import EmbedSpec
from d2f_core.correspondence.teachers import TransformerTeacher
from d2f_core.data.sources.config import lies_in
from d2f_core.hashing import file_sha256
from d2f_core.model.base import describe_base, described_copy
from d2f_core.model.efficientnet import load_efficientnet_lite0
from d2f_core.storage import check_reachable


def check_embed(config: EmbedConfig) -> TableJob:
    """Check everything that can be checked before a cluster is used.

    Raises:
        ValueError: unusable storage, source or teacher; one line each.
    """
    for name, value in (("source.uri", config.source.uri), ("output", config.output)):
        if not value:
            raise EmbedError(f"{name} is empty. Give --{name} URI.")
    if lies_in(config.output, config.source.uri):
        raise EmbedError(f"output={config.output!r} lies inside the source {config.source.uri!r}. Put it beside it.")
    check_reachable(config.source.uri)
    check_reachable(config.output, write=True)
    planned, points = source.plan(config)
    shapes, teachers = {}, {}
    for teacher in config.teachers:
        shapes[teacher.column], weights = describe_teacher(teacher)
        teachers[teacher.column] = {**_reading(teacher), "weights": weights}
    inputs = {
        "source": config.source.uri,
        "source_kind": planned.kind,
        "source_digest": planned.digest,
        "max_pixels": config.max_pixels,
        "rows_per_part": config.rows_per_part,
    }
    shown = {name: list(shapes[name]) for name in shapes}
    fingerprint: dict[str, Any] = {"size": config.size, "teachers": teachers, "shapes": shown, "points": points}
    if config.embedding:
        _check_class_token(config)
        fingerprint["embedding"] = {"of": config.embedded_column, "pooling": config.pooling}
    spec = EmbedSpec(config=config, fingerprint=fingerprint, inputs=inputs, shapes=shapes, points=points)
    job = TableJob(spec=spec, source=planned, actor=Embedder)
    check_output(job)
    return job


def describe_teacher(config: TeacherConfig) -> tuple[tuple[int, int], str]:
    """Tokens and channels of a teacher's features, and the hash of its weights; none are loaded.

    Raises:
        ValueError: it cannot be what is asked for.
    """
    if config.kind == "diffusion":
        check_reachable(config.uri)
        base = describe_base(config.uri)
        height, width, channels = described_shape(base, config.block, config.size)
        return (height * width, channels), base.content_hash
    if config.kind == "transformer":
        check_reachable(config.uri)
        weights = described_copy(config.uri).hash()
    else:
        weights = file_sha256(load_efficientnet_lite0("meta")[1])
    teacher = build_teacher(config, torch.device("meta"))
    return (teacher.grid[0] * teacher.grid[1], teacher.channels), weights


def _check_class_token(config: EmbedConfig) -> None:
    """Raise EmbedError when the embedding is to be the class token of a network without one."""
    chosen = next(teacher for teacher in config.teachers if teacher.name == config.embedding)
    if config.pooling == "class":
        teacher = build_teacher(chosen, torch.device("meta"))
        if not cast(TransformerTeacher, teacher).has_class_token:
            raise EmbedError(f"{chosen.uri!r} of teacher {chosen.name!r} has no class token. Give pooling='mean'.")


def _reading(config: TeacherConfig) -> dict[str, Any]:
    """The fields that determine a teacher's features, besides its weights; those of its own kind alone."""
    own = {
        "transformer": ("layers",),
        "diffusion": ("block", "timesteps", "prompt", "micro_conditioning", "seed", "dtype"),
        "efficientnet-lite0": ("blocks",),
    }[config.kind]
    values = dataclasses.asdict(config)
    chosen = {name: values[name] for name in ("kind", "size", "normalisation", *own)}
    return json.loads(json.dumps(chosen))  # as a manifest that is read again has it
