"""The table that a distillation reads: images, whose pairs are made in each micro-batch, or given pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from d2f_core.correspondence.embed.config import FEATURES
from d2f_core.correspondence.mine.table import read_clusters
from d2f_core.correspondence.pair_task import PairTask, pair_columns
from d2f_core.correspondence.targets.spec import PAIRS
from d2f_core.correspondence.task import MatcherTask, columns_of
from d2f_core.correspondence.teacher_columns import shares_of, teachers_of
from d2f_core.data.manifest import Buckets, Manifest, bucket_runs, read_manifest
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.data.table_plan import BucketError, OrderConfig, RowBuckets, plan_tables, row_buckets
from d2f_core.data.table_reader import read_columns
from d2f_core.train.precision import DTYPES
from pipelines.configs import order_of
from pipelines.distill_config import DistillConfig


def check_table(config: DistillConfig, manifest: Manifest, patch: int) -> None:
    """Raise ValueError when this training cannot use the table.

    Args:
        patch: height and width of the student's patches in pixels.
    """
    if manifest.kind not in (FEATURES, PAIRS):
        raise ValueError(
            f"features={config.features!r} holds {manifest.kind}. Give a table that embed_images or embed_pairs wrote."
        )
    if (size := int(manifest.fingerprint["size"])) % patch:
        raise ValueError(
            f"{config.features!r} holds images of {size} pixels, no multiple of the student's patch {patch}."
        )
    if manifest.kind == PAIRS:
        _check_pairs(config, manifest, patch)
    else:
        _check_images(config, manifest)


def _check_images(config: DistillConfig, manifest: Manifest) -> None:
    """Raise ValueError when a table of images lacks what a loss needs."""
    teachers, both = teachers_of(manifest), config.matcher.distillation.weight and config.matcher.multi_view.weight
    if config.train.micro_batch_size < 2:
        raise ValueError(
            f"train.micro_batch_size={config.train.micro_batch_size}: pairs are made within a micro-batch. Use 8."
        )
    if config.matcher.distillation.weight and not teachers:
        raise ValueError(
            f"{config.features!r} holds no teacher's features. Set distillation.weight to 0, or embed again."
        )
    shares_of(teachers, config.matcher.distillation)
    if both and config.bucket == "things" and config.things == 1:
        raise ValueError(
            "things=1: all images of a micro-batch show one thing, and teachers teach pairs of two. Use 2, or set "
            "distillation.weight to 0."
        )
    views = manifest.fingerprint.get("points")
    if (config.matcher.multi_view.weight or config.bucket == "things") and not views:
        raise ValueError(
            f"{config.features!r} holds images, no views: multi_view.weight must be 0 and bucket 'category'. Embed a "
            "table of views for that."
        )


def _check_pairs(config: DistillConfig, manifest: Manifest, patch: int) -> None:
    """Raise ValueError when a table of pairs was made for another training."""
    if config.matcher.multi_view.weight or config.bucket != "category":
        raise ValueError(
            f"{config.features!r} holds pairs: multi_view.weight must be 0 and bucket 'category', as it is by default. "
            "Pairs within buckets are made of a table of images."
        )
    asked, of = config.matcher.distillation, manifest.fingerprint["targets"]
    total = sum(asked.shares.values())
    shares = {name: share / total for name, share in asked.shares.items()} or {
        name: 1 / len(of["shares"]) for name in of["shares"]
    }
    wanted = {"patch": patch, "shares": _rounded(shares)}
    wanted |= {name: getattr(asked, name) for name in ("teacher_temperature", "finer", "cycle")}
    there = {**of, "patch": manifest.fingerprint["patch"], "shares": _rounded(of["shares"])}
    if other := [f"{name}={there[name]}, not {value}" for name, value in wanted.items() if there[name] != value]:
        raise ValueError(
            f"The targets in {config.features!r} were made with {'; '.join(other)}. Train with the same "
            "matcher.distillation and student, or make a table with these by embed_pairs."
        )


def _rounded(shares: Mapping[str, float]) -> dict[str, float]:
    return {name: round(share, 9) for name, share in sorted(shares.items())}


def plan_of(config: DistillConfig, manifest: Manifest) -> tuple[StreamPlan, OrderConfig]:
    """Which rows each micro-batch holds: images of one bucket, or any pairs.

    Raises:
        BucketError, ManifestError: see `buckets_of`.
    """
    images = manifest.kind == FEATURES
    # Dropout is drawn for a micro-batch as a whole, so its size is part of what is computed.
    order = order_of_images(config) if images else replace(order_of(config.train), micro_batches_matter=True)
    columns = columns_of(config.matcher, teachers_of(manifest)) if images else pair_columns(config.matcher)
    plan = plan_tables(
        [config.features], [manifest], columns, order, holdout_rows=0, num_steps=config.train.num_steps,
        buckets=[buckets_of(config, manifest)] if images else None,
    )  # fmt: skip
    return plan, order


def task_of(config: DistillConfig, manifest: Manifest, device: str) -> MatcherTask | PairTask:
    """The task that the table's rows are for."""
    about: dict[str, Any] = {
        "normalisation": config.normalisation, "seed": config.train.seed, "dtype": DTYPES[config.train.precision],
        "device": device,
    }  # fmt: skip
    if manifest.kind == PAIRS:
        return PairTask(config.matcher, **about)
    return MatcherTask(config.matcher, teachers_of(manifest), **about)


def order_of_images(config: DistillConfig) -> OrderConfig:
    """The sample order: each micro-batch holds images of one bucket."""
    name = config.bucket_column
    if config.bucket == "retrieval":
        name = f"{name} {read_manifest(config.clusters).digest}"
    return replace(order_of(config.train), bucket_column=name)


def buckets_of(config: DistillConfig, manifest: Manifest) -> Buckets | RowBuckets:
    """The rows that may share a micro-batch; those of a category or of some things must follow one another.

    Raises:
        ManifestError: they do not.
        BucketError: a bucket has fewer images than a micro-batch, or an image is in no cluster.
    """
    table = read_columns(config.features, manifest, ("sample_id", "category", "mesh"))
    ids, categories, meshes = (table.column(name).to_pylist() for name in ("sample_id", "category", "mesh"))
    if config.bucket == "retrieval":
        found = row_buckets(clusters_of_rows(config, ids))
        _check_sizes(config, found.buckets)
        return found
    runs = bucket_runs(categories if config.bucket == "category" else groups(categories, meshes, config.things))
    _check_sizes(config, runs)
    return runs


def clusters_of_rows(config: DistillConfig, ids: Sequence[str]) -> list[str]:
    """The cluster of each row's image.

    Raises:
        BucketError: an image is in none.
    """
    clusters = read_clusters(config.clusters)
    if missing := [name for name in ids if name not in clusters]:
        raise BucketError(
            f"{len(missing)} of {len(ids)} images of {config.features!r} are in no cluster of {config.clusters!r}, "
            f"such as {missing[0]!r}. Mine pairs of this table."
        )
    return [clusters[name] for name in ids]


def _check_sizes(config: DistillConfig, buckets: Buckets) -> None:
    small = [(rows, name) for name, rows in buckets if rows < config.train.micro_batch_size]
    if small:
        rows, name = min(small)
        raise BucketError(
            f"{len(small)} of {len(buckets)} buckets of {config.features!r} have fewer images than "
            f"train.micro_batch_size={config.train.micro_batch_size}: {name!r} has {rows}. Lower it to {rows}, or "
            "leave these images out."
        )


def groups(categories: Sequence[str], meshes: Sequence[str], things: int) -> list[str]:
    """For each image the name of its group: so many things of its category that follow one another.

    A category's last things join the group before when they are too few for one of their own.
    """
    order: dict[str, dict[str, int]] = {}
    for category, mesh in zip(categories, meshes, strict=True):
        its = order.setdefault(category, {})
        its.setdefault(mesh, len(its))
    return [
        f"{category}/{min(order[category][mesh] // things, max(1, len(order[category]) // things) - 1)}"
        for category, mesh in zip(categories, meshes, strict=True)
    ]
