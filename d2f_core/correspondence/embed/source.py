"""The images of an embedding job: those of a table of views with what is known of them, or any images."""

import posixpath
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from d2f_core.correspondence.embed.config import EmbedConfig, EmbedError
from d2f_core.data.manifest import manifest_exists, read_manifest
from d2f_core.data.schema import array_kind
from d2f_core.data.sources.images import plan_images
from d2f_core.data.sources.listing import Sizes, SourcePlan, plan_source
from d2f_core.data.sources.parquet_rows import DamagedFileError, RowRun, plan_rows, text_of
from d2f_core.data.sources.sample import Sample, SourceKind

VIEWS = "views"
MEMBER = re.compile(r"\.(tar|parquet)#")
"""In the origin of an image that is no file of its own."""
COLUMNS = ("image", "category", "mesh", "split", "surface_points", "surface_visible")
"""Of a table of views, that a training uses."""


@dataclass(frozen=True, kw_only=True)
class ViewSample(Sample):
    """A view as stored in its table."""

    category: str = ""
    mesh: str = ""
    surface_points: bytes = b""
    """float32 [points, 2] in pixels of the image."""
    surface_visible: bytes = b""
    """bool [points]"""


@dataclass(frozen=True, kw_only=True)
class ViewShard:
    run: RowRun
    split: str
    categories: tuple[str, ...]

    @property
    def num_rows(self) -> int | None:
        """Not known where rows are chosen."""
        return None if self.split or self.categories else self.run.num_rows

    def read(self) -> Iterator[ViewSample]:
        try:
            for uri, record in self.run.read():
                told = {name: text_of(record[name]) or "" for name in ("category", "mesh", "split")}
                if told.pop("split") != self.split != "" or (
                    self.categories and told["category"] not in self.categories
                ):
                    continue
                known = {name: record[name] for name in ("surface_points", "surface_visible")}
                yield ViewSample(source_uri=uri, image=record["image"], caption=None, **told, **known)
        except DamagedFileError as error:
            yield ViewSample(source_uri=self.run.uri, image=None, caption=None, problem=str(error), rows=error.rows)


def is_views(uri: str) -> bool:
    """Whether a URI holds a table of views."""
    return manifest_exists(uri) and read_manifest(uri).kind == VIEWS


def plan(config: EmbedConfig) -> tuple[SourcePlan, int]:
    """The source, cut into shards, and the number of surface points that each view has; 0: the images are no views.

    Raises:
        EmbedError: a split or categories of images that have none, or a prompt that needs a category.
        SourceError: the source is empty, mixes layouts, or lacks columns.
    """
    if not is_views(config.source.uri):
        for name in ("split", "categories"):
            if value := getattr(config, name):
                raise EmbedError(f"{name}={value!r}, and {config.source.uri!r} is no table of views. Leave it out.")
        planned = plan_images(config.source, rows_per_shard=config.rows_per_part, captions=False)
        asking = [teacher.name for teacher in config.teachers if teacher.prompt == "category"]
        if asking and planned.kind != "folder":
            raise EmbedError(
                f"teacher {asking[0]!r} has prompt='category', and images of a {planned.kind} have none. Use a folder "
                "with a directory for each category, or prompt='generic'."
            )
        return planned, 0
    points = set()

    def columns(uri: str, schema: pa.Schema) -> list[str]:
        if missing := [name for name in COLUMNS if name not in schema.names]:
            raise EmbedError(f"{uri!r} lacks the columns {missing} of a view. Make the table again.")
        points.add(array_kind(schema.field("surface_points"))[0][0])
        return list(COLUMNS)

    def cut(_kind: SourceKind, sizes: Sizes) -> Collection[Any]:
        runs = plan_rows(sizes, columns, config.rows_per_part)
        return [ViewShard(run=run, split=config.split, categories=config.categories) for run in runs]

    chosen = (*COLUMNS, config.split, *config.categories)
    planned = plan_source(config.source.uri, "parquet", chosen, cut)
    if len(points) != 1:
        raise EmbedError(f"{config.source.uri!r} has views with {sorted(points)} surface points. Make the table again.")
    return planned, points.pop()


def category_of(sample: Sample) -> str:
    """A view's category, or the name of the directory that holds an image file; empty for members of tars and rows."""
    if isinstance(sample, ViewSample):
        return sample.category
    if MEMBER.search(sample.source_uri):
        return ""
    return posixpath.basename(posixpath.dirname(sample.source_uri))
