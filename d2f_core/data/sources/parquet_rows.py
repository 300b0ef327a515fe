"""Parquet files as runs of rows, each small enough for one task."""

import itertools
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.sources.sample import SourceError
from d2f_core.retry import is_network_trouble, one_line
from d2f_core.s3_calls import fetched_whole, read_on
from d2f_core.storage import arrow_filesystem, retried

READ_THREADS = 16
READ_ROWS, READ_BYTES = 64, 32 * 2**20
"""Most rows read at a time, and the most bytes that they may have together: large rows are read in smaller numbers."""
BOMB_BYTES, BOMB_RATIO = 128 * 2**20, 20
"""A column of a row group is not unpacked if it would exceed both limits, in bytes and as a multiple of its compressed
size: image files are already compressed, and grow by a few per cent."""

BYTES_OF_TEXT = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


class DamagedFileError(ValueError):
    """The remaining rows of a run cannot be read; holds their number, and the ledger's reason as its message."""

    def __init__(self, reason: str, rows: int) -> None:
        super().__init__(reason)
        self.rows = rows


@dataclass(frozen=True, kw_only=True)
class RowRun:
    """Consecutive row groups of one file."""

    uri: str
    row_groups: tuple[int, ...]
    first_row: int
    """Row number, within the file, of the run's first row."""
    num_rows: int
    columns: tuple[str, ...]

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each row's origin (the table's own `source_uri` if it has one) and its columns, with text as bytes.

        Raises:
            DamagedFileError: after the rows that could be read.
        """
        row = self.first_row
        try:
            for record in read_on(self.uri, self._records, _is_damage):
                yield _origin(record.get("source_uri")) or f"{self.uri}#row={row}", record
                row += 1
        except Exception as error:
            if not _is_damage(error):
                raise
            raise DamagedFileError(
                f"damaged_file: nothing can be read from row {row} on ({one_line(error, 200)})",
                self.first_row + self.num_rows - row,
            ) from None

    def _records(self) -> Iterator[dict[str, Any]]:
        with _open(self.uri) as file:
            for group in self.row_groups:
                rows = max(1, min(READ_ROWS, READ_BYTES // max(1, _unpacked_bytes(file, group, self.columns))))
                for batch in file.iter_batches(rows, row_groups=[group], columns=list(self.columns)):
                    yield from _texts_as_bytes(batch).to_pylist()


def _unpacked_bytes(file: pq.ParquetFile, group: int, columns: Collection[str]) -> int:
    """Uncompressed bytes of a row group's largest needed column, as the file's metadata state them.

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


def _texts_as_bytes(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows with text as bytes, since text in a parquet file need not be valid UTF-8."""
    columns = []
    for column in batch.columns:
        plain = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
        columns.append(plain.cast(BYTES_OF_TEXT.get(plain.type, plain.type)))
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts, each as it is or by its number in a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in BYTES_OF_TEXT


def _origin(value: Any) -> str | None:
    """A row's own `source_uri`, which may be a number in somebody else's table."""
    return text_of(value) if isinstance(value, bytes) else None if value is None else str(value)


def text_of(value: bytes | None) -> str | None:
    """Decode UTF-8; invalid bytes become U+FFFD, which the caption check refuses."""
    return None if value is None else value.decode("utf-8", errors="replace")


def _is_damage(error: BaseException) -> bool:
    """Whether the file is at fault, rather than the disk, the network or a missing permission."""
    if isinstance(error, OSError):  # pyarrow raises it for a corrupt page too, then without an errno
        return error.errno is None and "AWS Error" not in str(error) and not is_network_trouble(error)
    return isinstance(error, (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowMemoryError, UnicodeDecodeError))


def _open(uri: str) -> pq.ParquetFile:
    filesystem, path = arrow_filesystem(uri)
    try:
        once = lambda: pq.ParquetFile(filesystem.open_input_file(path), pre_buffer=True)  # noqa: E731
        return fetched_whole(uri, lambda: retried(f"open {uri}", once), pa.ArrowInvalid)
    except Exception as error:
        if not _is_damage(error):
            raise
        raise SourceError(f"{uri!r} is not a parquet file ({one_line(error)}). Replace or remove it.") from None


def plan_rows(
    files: Collection[str], columns: Callable[[str, pa.Schema], Collection[str]], rows_per_run: int
) -> list[RowRun]:
    """Split the parquet files among `files`, sorted by name, into runs of about `rows_per_run` rows.

    Args:
        columns: function of a file's URI and schema that returns the columns to read, and raises SourceError when some
            are missing. A column `source_uri` is read in addition.

    Raises:
        SourceError: a file is not parquet; or raised by `columns`.
    """
    uris = sorted(uri for uri in files if uri.lower().endswith(".parquet"))
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(itertools.chain.from_iterable(pool.map(lambda uri: _plan_file(uri, columns, rows_per_run), uris)))


def _plan_file(uri: str, columns: Callable[[str, pa.Schema], Collection[str]], rows_per_run: int) -> list[RowRun]:
    with _open(uri) as file:
        schema, metadata = file.schema_arrow, file.metadata
        groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    names = (*columns(uri, schema), *(["source_uri"] if "source_uri" in schema.names else []))
    runs, first_group, first_row, rows = [], 0, 0, 0
    for number, count in enumerate(groups):
        rows += count
        # A run ends before the group that would make it too long, so that a shard is usually one part of the output.
        if number + 1 == len(groups) or rows + groups[number + 1] > rows_per_run:
            groups_of_run = tuple(range(first_group, number + 1))
            runs.append(RowRun(uri=uri, row_groups=groups_of_run, first_row=first_row, num_rows=rows, columns=names))
            first_group, first_row, rows = number + 1, first_row + rows, 0
    return runs


def check_bytes_column(uri: str, schema: pa.Schema, name: str, what: str, fix: str) -> None:
    """Raise SourceError unless the column holds bytes, or a struct with a field of bytes."""
    if not holds_bytes(schema, name):
        raise SourceError(f"{uri!r} has no column {name!r} of {what} bytes. Its columns: {describe(schema)}. {fix}")


def holds_bytes(schema: pa.Schema, name: str) -> bool:
    """Whether there is a column of this name with bytes, or with structs that have a field of bytes."""
    if name not in schema.names:
        return False
    kind = schema.field(name).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
