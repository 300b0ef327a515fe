"""Parquet with image bytes and captions: this project's image tables, and any others by column name."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from d2f_core.data.image_headers import MAX_IMAGE_BYTES, too_large
from d2f_core.data.sources.captions import CAPTION_COLUMNS, CaptionRules, captioned
from d2f_core.data.sources.parquet_rows import (
    DamagedFileError,
    RowRun,
    check_bytes_column,
    describe,
    holds_bytes,
    is_text,
    plan_rows,
    text_of,
)
from d2f_core.data.sources.sample import MAX_TEXT_BYTES, Sample, SourceError

IMAGE_COLUMN, OTHER_IMAGE_COLUMN = "image", "images"
"""The column of images that is read if none is named, and the one that is tried where it is missing."""


@dataclass(frozen=True, kw_only=True)
class ParquetShard:
    run: RowRun
    """The run's columns begin with the image column, then the caption column if captions are read."""
    rules: CaptionRules

    @property
    def num_rows(self) -> int | None:
        """Not known where each of several captions is a sample."""
        return None if self.rules.several == "all" else self.run.num_rows

    def read(self) -> Iterator[Sample]:
        image, caption = self.run.columns[0], self.run.columns[1] if self.rules.read else ""
        try:
            for uri, record in self.run.read():
                yield from _samples(uri, record[image], record.get(caption), self.rules)
        except DamagedFileError as error:
            yield Sample(source_uri=self.run.uri, image=None, caption=None, problem=str(error), rows=error.rows)


def _samples(uri: str, image: bytes | dict | None, texts: Any, rules: CaptionRules) -> Iterator[Sample]:
    found = texts if isinstance(texts, list) else [texts]
    content = image.get("bytes") if isinstance(image, dict) else image
    problem = None
    parts = [("image", content, MAX_IMAGE_BYTES), *(("caption", text, MAX_TEXT_BYTES) for text in found)]
    for name, value, most in parts:
        if value is not None and len(value) > most:
            problem = problem or f"{too_large(len(value), most)} ({name})"
    if problem is None and content is None:
        # The `datasets` library stores an image as bytes, or only a path.
        path = image.get("path") if isinstance(image, dict) else None
        problem = f"no_image: the table holds only the path {path!r}" if path else "no_image: null in the table"
    if problem or content is None:
        yield Sample(source_uri=uri, image=None, caption=None, problem=problem)
    else:
        yield from captioned(uri, content, partial(_texts, found), rules)


def _texts(found: Sequence[bytes | str | None]) -> list[str]:
    return [text_of(text) or "" if isinstance(text, bytes) else text for text in found if text is not None]


def plan_parquet(
    files: Collection[str], image_column: str, rules: CaptionRules, rows_per_shard: int
) -> list[ParquetShard]:
    """Split the parquet files among `files`, sorted by name, into runs of about `rows_per_shard` rows.

    Raises:
        SourceError: a file lacks the needed columns, or has lists of captions and no rule which to take.
    """

    def columns(uri: str, schema: pa.Schema) -> list[str]:
        names = [_caption_column(uri, schema, rules)] if rules.read else []
        fix = "Name the one with the images: --source.image-column NAME."
        name = image_column
        if name == IMAGE_COLUMN and not holds_bytes(schema, name) and holds_bytes(schema, OTHER_IMAGE_COLUMN):
            name = OTHER_IMAGE_COLUMN
        check_bytes_column(uri, schema, name, "image", fix)
        return [name, *names]

    return [ParquetShard(run=run, rules=rules) for run in plan_rows(files, columns, rows_per_shard)]


def _caption_column(uri: str, schema: pa.Schema, rules: CaptionRules) -> str:
    candidates = (rules.column,) if rules.column else CAPTION_COLUMNS
    for name in candidates:
        kind = schema.field(name).type if name in schema.names else pa.null()
        if is_text(kind):
            return name
        if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_text(kind.value_type):
            if rules.several is None:
                raise SourceError(
                    f"{uri!r} has several captions in each row of {name!r}. Give --source.captions first, or all for a "
                    "sample each."
                )
            return name
    raise SourceError(
        f"{uri!r} has no text column {' or '.join(candidates)}. Its columns: {describe(schema)}. "
        "Name the one with the captions: --source.caption-column NAME."
    )
