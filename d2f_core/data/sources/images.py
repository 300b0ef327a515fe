"""Images, with captions or without: a folder, webdataset tars, or parquet with image bytes."""

from collections.abc import Collection, Iterator
from typing import Any

import ray.data

from d2f_core.data.ray_data import configure
from d2f_core.data.sources.config import ImageSource
from d2f_core.data.sources.folder import plan_folder
from d2f_core.data.sources.listing import Sizes, SourcePlan, plan_source
from d2f_core.data.sources.parquet import plan_parquet
from d2f_core.data.sources.sample import Shard, SourceKind
from d2f_core.data.sources.tar import plan_tars

MAX_READ_BLOCKS = 1000


def plan_images(source: ImageSource, *, rows_per_shard: int = 256, captions: bool = True) -> SourcePlan:
    """List the source and cut it into shards of about `rows_per_shard` samples (a tar is always one shard).

    Args:
        captions: False for images alone: captions are neither needed nor read, and every sample's is None.

    Raises:
        SourceError: the source is empty, mixes layouts, or lacks columns.
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
    """The source as a dataset of `image` (bytes), `caption`, `source_uri` and `problem`, in no fixed order.

    Raises:
        SourceError: see `plan_images`, which has the same arguments.
    """
    shards = plan_images(source, rows_per_shard=rows_per_shard, captions=captions).shards
    items = [{"shard": number} for number in range(len(shards))]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(shards), MAX_READ_BLOCKS))
    configure(dataset)

    def read(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for sample in shards[row["shard"]].read():
            yield vars(sample)

    return dataset.flat_map(read)  # pyright: ignore[reportArgumentType] -- a generator is accepted
