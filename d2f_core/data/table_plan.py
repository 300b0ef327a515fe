"""The plan of a training over tables, and the part of it that identifies stored work.

A bucket holds the rows that may share a batch. By default each table is one, and each global batch comes from one of
them. With a bucket column the runs in the tables' manifests are the buckets (a category, a cluster), hundreds if need
be, and each micro-batch comes from one of those:

    which bucket    Over a cycle of as many micro-batches as all buckets have (ceil(rows / micro-batch) each), every
                    bucket gives its own number, shuffled; so buckets come up in proportion to their rows.
    which rows      The bucket's own order of samples, which runs on across its epochs: each row exactly once in every
                    epoch of the bucket. Nothing is dropped and nothing left over: where a bucket's rows end within a
                    micro-batch, its next epoch fills it up. So small buckets run ahead of large ones by less than a
                    micro-batch per cycle; and a bucket with fewer rows than a micro-batch holds some of them twice in
                    one.
    held out        `holdout_rows` rows of each bucket, spread evenly over it.

Rows of a bucket that follow one another are read fastest; where they lie apart, `RowBuckets` lists them.

The buckets of consecutive micro-batches lie all over the table, so a row group is rarely wanted twice within a short
time, and up to as many times the bytes are read as it has rows (see `chunks`). Write such a table with few rows to a
row group, down to one where rows are megabytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from d2f_core.data.manifest import Buckets, Manifest, bucket_runs
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.stream_plan import Source, StreamPlan
from d2f_core.randomness import keyed_generator


class BucketError(ValueError):
    """A table whose buckets cannot be trained on as asked."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowBuckets:
    """Buckets whose rows need not follow one another in the table."""

    buckets: Buckets
    """Value and number of rows of each bucket."""
    rows: np.ndarray
    """int64 [rows of the table]: each of its rows once, bucket after bucket."""


def row_buckets(values: Sequence[str]) -> RowBuckets:
    """The buckets of a table whose rows have these values, by value; the rows of each in the table's order."""
    named = np.array(values)
    rows = np.argsort(named, kind="stable")
    return RowBuckets(buckets=bucket_runs(named[rows].tolist()), rows=rows)


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """Settings that determine, together with the tables, the order of rows and which rows share a batch."""

    seed: int = 0
    global_batch_size: int
    """Samples per optimizer step, over all workers."""
    micro_batch_size: int
    """Samples per forward pass."""
    lanes: int = 16
    window_rows: int = 512
    """Consecutive rows that are read and shuffled together; see `SampleOrder`."""
    bucket_column: str = ""
    """Column whose values are the tables' buckets: each micro-batch holds rows of one. Empty: each table is one bucket.
    The buckets themselves are read from the manifests; the name is used only in the identity."""
    micro_batches_matter: bool = False
    """Whether the loss depends on which samples share a micro-batch, as a contrastive loss does. Always assumed with a
    bucket column."""

    def identity(self) -> dict[str, Any]:
        """The values that must stay the same for a resumed training to see the same samples and losses.

        The micro-batch size is included only where it changes what is computed.
        """
        names = ["seed", "global_batch_size", "lanes", "window_rows"]
        names += ["bucket_column"] * bool(self.bucket_column)
        names += ["micro_batch_size"] * bool(self.bucket_column or self.micro_batches_matter)
        return {name: getattr(self, name) for name in names}


def plan_tables(
    uris: Sequence[str],
    manifests: Sequence[Manifest],
    columns: tuple[str, ...],
    order: OrderConfig,
    *,
    holdout_rows: int | Sequence[int],
    num_steps: int,
    buckets: Sequence[Buckets | RowBuckets] | None = None,
    in_proportion_to: Literal["batches", "rows"] = "batches",
) -> StreamPlan:
    """Plan the order of the training rows and the held-out rows.

    Args:
        holdout_rows: rows of each bucket that are kept for validation; a number, or one for each table.
        buckets: of each table, where a bucket column is given; None: those of the manifests. So one table can be
            trained on by this column or by that.
        in_proportion_to: how often buckets take turns; see `StreamPlan`.

    Raises:
        BucketError: a bucket column is given, but a table has no buckets, or a bucket has no rows to train on.
    """
    held = [holdout_rows] * len(uris) if isinstance(holdout_rows, int) else holdout_rows
    its = buckets or [each.buckets for each in manifests]
    sources = [
        source for table in zip(uris, manifests, its, held, strict=True) for source in _sources(*table, order=order)
    ]
    return StreamPlan(
        sources=tuple(sources),
        columns=columns,
        global_batch_size=order.global_batch_size,
        micro_batch_size=order.micro_batch_size,
        num_steps=num_steps,
        seed=order.seed,
        one_source_per="micro_batch" if order.bucket_column else "global_batch",
        in_proportion_to=in_proportion_to,
    )


def _sources(
    uri: str, manifest: Manifest, buckets: Buckets | RowBuckets, holdout_rows: int, *, order: OrderConfig
) -> Iterator[Source]:
    """One source for the whole table, or one per bucket."""
    if not order.bucket_column:
        yield Source(uri=uri, order=_order(order, manifest.num_rows, holdout_rows, order.seed), digest=manifest.digest)
        return
    listed = () if isinstance(buckets, tuple) else tuple(buckets.rows.tolist())
    runs = buckets if isinstance(buckets, tuple) else buckets.buckets
    if listed and sorted(listed) != list(range(manifest.num_rows)):
        raise BucketError(f"The buckets of {uri!r} do not hold each of its {manifest.num_rows} rows once.")
    _check_buckets(uri, runs, order, holdout_rows)
    first, digest = 0, manifest.digest
    for value, rows in runs:
        # Each bucket has its own seed, or buckets of equal size would all be shuffled alike.
        seed = int(keyed_generator(order.seed, value, "bucket").integers(2**62))
        its, own = _order(order, rows, holdout_rows, seed), listed[first : first + rows]
        yield Source(uri=uri, order=its, first_row=first, digest=digest, rows=own)
        first += rows


def _order(order: OrderConfig, rows: int, holdout_rows: int, seed: int) -> SampleOrder:
    return SampleOrder(
        num_rows=rows,
        holdout_rows=holdout_rows,
        seed=seed,
        batch=order.micro_batch_size if order.bucket_column else order.global_batch_size,
        lanes=order.lanes,
        window_rows=order.window_rows,
    )


def _check_buckets(uri: str, buckets: Buckets, order: OrderConfig, holdout_rows: int) -> None:
    if not buckets:
        raise BucketError(
            f"bucket_column={order.bucket_column!r}, and the manifest of {uri!r} has no buckets. Write the table with "
            f"rows sorted by {order.bucket_column!r} and `buckets=bucket_runs(values)` in its manifest."
        )
    small = sorted((rows, value) for value, rows in buckets if rows <= holdout_rows)
    if small:
        rows, value = small[0]
        raise BucketError(
            f"holdout_rows={holdout_rows} of each bucket are held out, and {len(small)} of {len(buckets)} "
            f"buckets of {uri!r} have no more rows than that: {value!r} has {rows}. Lower holdout_rows to {rows - 1}, "
            "or write the table without these buckets."
        )
