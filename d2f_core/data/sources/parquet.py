"""Parquet with image bytes and captions: our own image tables, and others' by column name."""

import itertools
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.sources.sample import CAPTION_COLUMNS, Sample, SourceError
from d2f_core.storage import arrow_filesystem

READ_THREADS = 16
READ_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class ParquetShard:
    """Consecutive row groups of one file."""

    uri: str
    row_groups: tuple[int, ...]
    first_row: int
    """Number of the first of its rows within the file."""
    num_rows: int
    image_column: str
    caption_column: str
    own_uris: bool
    """The table has a column `source_uri` that says where each image came from."""

    def read(self) -> Iterator[Sample]:
        columns = [self.image_column, self.caption_column, *(["source_uri"] if self.own_uris else [])]
        row = self.first_row
        with _open(self.uri) as file:
            batches = file.iter_batches(READ_ROWS, row_groups=list(self.row_groups), columns=columns)
            for batch in batches:
                for record in batch.to_pylist():
                    uri = record["source_uri"] if self.own_uris else f"{self.uri}#row={row}"
                    yield _sample(uri, record[self.image_column], record[self.caption_column])
                    row += 1


def _sample(uri: str, image: bytes | dict | None, caption: str | None) -> Sample:
    if isinstance(image, dict):  # how the `datasets` library stores an image: its bytes, or only a path
        path, image = image.get("path"), image.get("bytes")
        if image is None and path:
            problem = f"no_image: the table holds only the path {path!r}"
            return Sample(source_uri=uri, image=None, caption=caption, problem=problem)
    if image is None:
        return Sample(source_uri=uri, image=None, caption=caption, problem="no_image: null in the table")
    return Sample(source_uri=uri, image=image, caption=caption)


def _open(uri: str) -> pq.ParquetFile:
    filesystem, path = arrow_filesystem(uri)
    try:
        return pq.ParquetFile(filesystem.open_input_file(path), pre_buffer=True)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{uri!r} is not a parquet file ({error}). Replace or remove it.") from None


def plan_parquet(
    files: Collection[str], image_column: str, caption_column: str | None, rows_per_shard: int
) -> list[ParquetShard]:
    """Cut the parquet files among `files`, in the order of their names, into runs of about `rows_per_shard` rows.

    Raises:
        SourceError: a file without the needed columns; names those that it has.
    """
    uris = sorted(uri for uri in files if uri.endswith(".parquet"))
    with ThreadPoolExecutor(READ_THREADS) as pool:
        plans = pool.map(lambda uri: _plan_file(uri, image_column, caption_column, rows_per_shard), uris)
        return list(itertools.chain.from_iterable(plans))


def _plan_file(uri: str, image_column: str, caption_column: str | None, rows_per_shard: int) -> list[ParquetShard]:
    with _open(uri) as file:
        schema, metadata = file.schema_arrow, file.metadata
        groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    caption = _caption_column(uri, schema, caption_column)
    _check_image_column(uri, schema, image_column)
    shards, first_group, first_row, rows = [], 0, 0, 0
    for number, count in enumerate(groups):
        rows += count
        # A run ends before the group that would make it too long, so that a shard is usually one part of the output.
        if number + 1 == len(groups) or rows + groups[number + 1] > rows_per_shard:
            shard = ParquetShard(
                uri=uri,
                row_groups=tuple(range(first_group, number + 1)),
                first_row=first_row,
                num_rows=rows,
                image_column=image_column,
                caption_column=caption,
                own_uris="source_uri" in schema.names,
            )
            shards.append(shard)
            first_group, first_row, rows = number + 1, first_row + rows, 0
    return shards


def _caption_column(uri: str, schema: pa.Schema, asked: str | None) -> str:
    candidates = (asked,) if asked else CAPTION_COLUMNS
    for name in candidates:
        if name in schema.names and _is_text(schema.field(name).type):
            return name
    raise SourceError(
        f"{uri!r} has no text column {' or '.join(candidates)}. Its columns: {_describe(schema)}. "
        "Name the one with the captions: --source.caption-column NAME."
    )


def _check_image_column(uri: str, schema: pa.Schema, name: str) -> None:
    if name in schema.names:
        kind = schema.field(name).type
        if pa.types.is_struct(kind):
            kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return
    raise SourceError(
        f"{uri!r} has no column {name!r} of image bytes. Its columns: {_describe(schema)}. "
        "Name the one with the images: --source.image-column NAME."
    )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
