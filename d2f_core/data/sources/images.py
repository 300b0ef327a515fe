"""Images, with captions or without: a folder, webdataset tars, or parquet with image bytes."""

from collections.abc import Collection, Iterator
from typing import Any

import ray.data

from d2f_core.data.ray_data import configure
from d2f_core.data.sources.captions import caption_rules
from d2f_core.data.sources.config import ImageSource
from d2f_core.data.sources.folder import lone_companions, plan_folder
from d2f_core.data.sources.listing import Sizes, SourcePlan, plan_source
from d2f_core.data.sources.parquet import plan_parquet
from d2f_core.data.sources.sample import LATER_IMAGE_SUFFIXES, PACKED_SUFFIXES, Shard, SourceKind
from d2f_core.data.sources.tar import plan_packed, plan_tars

MAX_READ_BLOCKS = 1000


def plan_images(source: ImageSource, *, rows_per_shard: int = 256, captions: bool = True) -> SourcePlan:
    """List the source and cut it into shards of about `rows_per_shard` samples (a tar is always one shard).

    Args:
        captions: False for images alone: captions are neither needed nor read, and every sample's is None.

    Raises:
        SourceError: the source is empty, mixes layouts, or lacks columns.
    """

    rules = caption_rules(source, read=captions)

    def cut(kind: SourceKind, sizes: Sizes) -> Collection[Shard]:
        packed = plan_packed(sizes) if source.kind == "auto" else []
        if kind == "parquet":
            return [*plan_parquet(sizes, source.image_column, rules, rows_per_shard), *packed]
        if kind == "webdataset":
            return [*plan_tars(sizes, rules, source.extensions), *packed]
        shards = plan_folder(sizes, rules, rows_per_shard, extensions=source.extensions, split=source.split)
        return [*shards, *packed]

    columns: list[Any] = [source.image_column, source.caption_column, *([] if captions else ["no captions"])]
    columns += [source.choices] if source.choices else []
    suffixes = (*LATER_IMAGE_SUFFIXES, *(PACKED_SUFFIXES if source.kind == "auto" else ()))

    def newly_listed(files: Collection[str]) -> bool:
        alone = not source.extensions and lone_companions(files)
        return bool(alone) or any(file.lower().endswith(suffixes) for file in files)

    return plan_source(source.uri, source.kind, columns, cut, split=source.split, newly_listed=newly_listed)


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
