"""Images as they lie around, with captions or without: a folder, webdataset tars, or parquet with image bytes.

A source is first planned, from its listing alone, into shards that tasks can read on their own; plan and order of the
samples are the same every time, which is what lets a job be resumed. Images with depth: `sources.depth`.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import ray.data

from d2f_core.data.sources.folder import plan_folder
from d2f_core.data.sources.listing import Sizes, SourcePlan, plan_source
from d2f_core.data.sources.parquet import plan_parquet
from d2f_core.data.sources.sample import Sample, Shard, SourceError, SourceKind
from d2f_core.data.sources.tar import plan_tars

__all__ = ["ImageSource", "Sample", "Shard", "SourceError", "SourcePlan", "plan_images", "read_images"]

MAX_READ_BLOCKS = 1000


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Where images are, and how to read them."""

    uri: str = ""
    """A directory, or one .tar or .parquet file: s3://bucket/key or a local path."""
    kind: Literal["auto", "folder", "webdataset", "parquet"] = "auto"
    """What lies there; `auto` looks, and refuses a mixture."""
    image_column: str = "image"
    """Parquet column with the bytes of image files (or the `datasets` library's struct of bytes and path)."""
    caption_column: str | None = None
    """Column or JSON key of the captions; None: `caption`, or else `text`."""


def plan_images(source: ImageSource, *, rows_per_shard: int = 256, captions: bool = True) -> SourcePlan:
    """List the source and cut it into shards of about `rows_per_shard` samples (a tar is always one shard).

    Args:
        captions: False for images alone: captions are neither needed nor read, and every sample's is None.

    Raises:
        SourceError: nothing there, a mixture of kinds, or missing columns.
    """

    def cut(kind: SourceKind, sizes: Sizes) -> Collection[Shard]:
        if kind == "parquet":
            return plan_parquet(sizes, source.image_column, source.caption_column, rows_per_shard, captions=captions)
        if kind == "webdataset":
            return plan_tars(sizes, source.caption_column, captions=captions)
        return plan_folder(sizes, source.caption_column, rows_per_shard, captions=captions)

    columns = (source.image_column, source.caption_column, *(() if captions else ("no captions",)))
    return plan_source(source.uri, source.kind, columns, cut)


def read_images(source: ImageSource, *, rows_per_shard: int = 256, captions: bool = True) -> ray.data.Dataset:
    """The source as a dataset of `image` (bytes), `caption`, `source_uri` and `problem`, in no certain order.

    Raises:
        SourceError: see `plan_images`, which has the same arguments.
    """
    shards = plan_images(source, rows_per_shard=rows_per_shard, captions=captions).shards
    items = [{"shard": number} for number in range(len(shards))]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(shards), MAX_READ_BLOCKS))

    def read(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for sample in shards[row["shard"]].read():
            yield vars(sample)

    return dataset.flat_map(read)  # pyright: ignore[reportArgumentType] -- a generator is accepted
