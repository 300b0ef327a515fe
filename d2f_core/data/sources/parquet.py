"""Parquet with image bytes and captions: our own image tables, and others' by column name."""

import itertools
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.image_headers import MAX_IMAGE_BYTES, too_large
from d2f_core.data.sources.sample import CAPTION_COLUMNS, MAX_TEXT_BYTES, Sample, SourceError
from d2f_core.retry import is_network_trouble, one_line
from d2f_core.storage import arrow_filesystem

READ_THREADS = 16
READ_ROWS, READ_BYTES = 64, 32 * 2**20
"""Most rows read at a time; fewer where a row may be so large that together they could pass the bytes."""
BOMB_BYTES, BOMB_RATIO = 128 * 2**20, 20
"""A column of a row group that would grow to more than both, in bytes and as a multiple, is not unpacked: image files
are compressed by themselves, and grow by a few per cent."""


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
        row = self.first_row
        try:
            with _open(self.uri) as file:
                for record in self._records(file):
                    uri = _text(record["source_uri"]) if self.own_uris else None
                    uri = uri or f"{self.uri}#row={row}"
                    yield _sample(uri, record[self.image_column], record[self.caption_column])
                    row += 1
        except Exception as error:
            if not _is_damage(error):
                raise
            problem = f"damaged_file: nothing can be read from row {row} on ({one_line(error, 200)})"
            yield Sample(source_uri=self.uri, image=None, caption=None, problem=problem)

    def _records(self, file: pq.ParquetFile) -> Iterator[dict[str, Any]]:
        columns = [self.image_column, self.caption_column, *(["source_uri"] if self.own_uris else [])]
        for group in self.row_groups:
            rows = max(1, min(READ_ROWS, READ_BYTES // max(1, _unpacked_bytes(file, group, columns))))
            for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
                yield from batch.cast(_texts_as_bytes(batch.schema)).to_pylist()


def _unpacked_bytes(file: pq.ParquetFile, group: int, columns: list[str]) -> int:
    """Bytes of a row group's largest needed column in memory, by the file's own account.

    Raises:
        pa.ArrowInvalid: a decompression bomb.
    """
    metadata, largest = file.metadata.row_group(group), 0
    for number in range(metadata.num_columns):
        column = metadata.column(number)
        if column.path_in_schema.partition(".")[0] not in columns:
            continue
        packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
        if unpacked > max(BOMB_BYTES, BOMB_RATIO * packed):
            raise pa.ArrowInvalid(f"{column.path_in_schema} grows from {packed:,} to {unpacked:,} bytes")
        largest = max(largest, unpacked)
    return largest


def _texts_as_bytes(schema: pa.Schema) -> pa.Schema:
    """The same columns with text as bytes: what is called text in a file need not be UTF-8."""
    kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    return pa.schema([field.with_type(kinds.get(field.type, field.type)) for field in schema])


def _text(value: bytes | None) -> str | None:
    """What is not UTF-8 becomes U+FFFD, which the caption check refuses."""
    return None if value is None else value.decode("utf-8", errors="replace")


def _is_damage(error: BaseException) -> bool:
    """Whether the file is at fault, rather than the disk, the network or a missing permission."""
    if isinstance(error, OSError):  # what pyarrow raises for a corrupt page too, then without a number
        return error.errno is None and "AWS Error" not in str(error) and not is_network_trouble(error)
    return isinstance(error, (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowMemoryError, UnicodeDecodeError))


def _sample(uri: str, image: bytes | dict | None, text: bytes | None) -> Sample:
    for name, value, most in (("image", image, MAX_IMAGE_BYTES), ("caption", text, MAX_TEXT_BYTES)):
        value = value.get("bytes") if isinstance(value, dict) else value
        if value is not None and len(value) > most:
            return Sample(source_uri=uri, image=None, caption=None, problem=f"{too_large(len(value), most)} ({name})")
    caption = _text(text)
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
    except Exception as error:
        if not _is_damage(error):
            raise
        raise SourceError(f"{uri!r} is not a parquet file ({one_line(error)}). Replace or remove it.") from None


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
