"""Parquet with image bytes and captions: this project's image tables, and any others by column name."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pyarrow as pa

from d2f_core.data.image_headers import MAX_IMAGE_BYTES, too_large
from d2f_core.data.sources.parquet_rows import (
    DamagedFileError,
    RowRun,
    check_bytes_column,
    describe,
    plan_rows,
    text_of,
)
from d2f_core.data.sources.sample import CAPTION_COLUMNS, MAX_TEXT_BYTES, Sample, SourceError


@dataclass(frozen=True, kw_only=True)
class ParquetShard:
    run: RowRun
    """The run's columns begin with the image column, then the caption column if captions are read."""
    captions: bool

    @property
    def num_rows(self) -> int:
        return self.run.num_rows

    def read(self) -> Iterator[Sample]:
        image, caption = self.run.columns[0], self.run.columns[1] if self.captions else ""
        try:
            for uri, record in self.run.read():
                yield _sample(uri, record[image], record.get(caption))
        except DamagedFileError as error:
            yield Sample(source_uri=self.run.uri, image=None, caption=None, problem=str(error), rows=error.rows)


def _sample(uri: str, image: bytes | dict | None, text: bytes | None) -> Sample:
    for name, value, most in (("image", image, MAX_IMAGE_BYTES), ("caption", text, MAX_TEXT_BYTES)):
        value = value.get("bytes") if isinstance(value, dict) else value
        if value is not None and len(value) > most:
            return Sample(source_uri=uri, image=None, caption=None, problem=f"{too_large(len(value), most)} ({name})")
    caption = text_of(text)
    if isinstance(image, dict):  # the `datasets` library stores an image as bytes, or only a path
        path, image = image.get("path"), image.get("bytes")
        if image is None and path:
            problem = f"no_image: the table holds only the path {path!r}"
            return Sample(source_uri=uri, image=None, caption=caption, problem=problem)
    if image is None:
        return Sample(source_uri=uri, image=None, caption=caption, problem="no_image: null in the table")
    return Sample(source_uri=uri, image=image, caption=caption)


def plan_parquet(
    files: Collection[str],
    image_column: str,
    caption_column: str | None,
    rows_per_shard: int,
    *,
    captions: bool = True,
) -> list[ParquetShard]:
    """Split the parquet files among `files`, sorted by name, into runs of about `rows_per_shard` rows.

    Raises:
        SourceError: a file lacks the needed columns; the message lists those that it has.
    """

    def columns(uri: str, schema: pa.Schema) -> list[str]:
        names = [_caption_column(uri, schema, caption_column)] if captions else []
        fix = "Name the one with the images: --source.image-column NAME."
        check_bytes_column(uri, schema, image_column, "image", fix)
        return [image_column, *names]

    return [ParquetShard(run=run, captions=captions) for run in plan_rows(files, columns, rows_per_shard)]


def _caption_column(uri: str, schema: pa.Schema, asked: str | None) -> str:
    candidates = (asked,) if asked else CAPTION_COLUMNS
    for name in candidates:
        if name in schema.names and _is_text(schema.field(name).type):
            return name
    raise SourceError(
        f"{uri!r} has no text column {' or '.join(candidates)}. Its columns: {describe(schema)}. "
        "Name the one with the captions: --source.caption-column NAME."
    )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
