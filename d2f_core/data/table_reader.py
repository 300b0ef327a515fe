"""Rows of a table by number, read in row groups; unusable rows are reported with the reason."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs

from d2f_core import storage
from d2f_core.data.arrays import array_bytes
from d2f_core.data.manifest import Manifest, TableFile
from d2f_core.data.schema import array_kind, is_array

FORMAT = pads.ParquetFileFormat(
    default_fragment_scan_options=pads.ParquetFragmentScanOptions(pre_buffer=True, page_checksum_verification=True)
)
OPEN_FILES = 256
"""Number of files whose parquet footers are cached."""


class DamagedDataError(ValueError):
    """Requested rows cannot be read, or hold numbers that are not finite."""


@dataclass(frozen=True)
class RowRange:
    """Consecutive rows of a table."""

    first: int
    table: pa.Table
    """The rows that could be read."""
    places: np.ndarray
    """Int64 [rows]: index in `table` of each row of the range; -1 for an unusable row."""
    reasons: dict[int, str]
    """Row number -> why the row cannot be used."""

    def keeping(self, rows: np.ndarray) -> "RowRange":
        """The same range with only these rows (int64, ascending), copied, so that the memory of the others can be
        freed.
        """
        places = self.places[rows - self.first]
        usable = places >= 0
        kept = np.full_like(self.places, -1)
        kept[rows[usable] - self.first] = np.arange(usable.sum())
        return RowRange(self.first, self.table.take(pa.array(places[usable])), kept, self.reasons)


@dataclass(frozen=True)
class RowGroup:
    """A row group of a table."""

    file: int
    number: int
    """Number of the row group within its file."""
    first: int
    end: int
    """`first` is the first row in the table, `end` one past the last."""


class TableReader:
    """Reads consecutive rows; safe to use from several threads.

    It holds a few numbers per run of equal row groups, at most two runs for a file of `write_part`: an index with a
    number per row would take seconds and gigabytes for a table of 1e9 rows.
    """

    def __init__(self, uri: str, manifest: Manifest, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        self._filesystem, self._root = storage.arrow_filesystem(uri)
        self._files, self._is_remote = manifest.files, storage.is_s3(uri)
        self.row_bytes = manifest.row_bytes
        runs = [(number, *run) for number, file in enumerate(manifest.files) for run in file.row_groups]
        # For each run: its file, and the rows per row group.
        self._run_files, self._run_sizes, counts = np.array(runs, np.int64).reshape(-1, 3).T
        # First row and first row group of each run, plus one past the last.
        self._run_rows = np.concatenate([[0], np.cumsum(self._run_sizes * counts)])
        self._run_groups = np.concatenate([[0], np.cumsum(counts)])
        self._fragment = lru_cache(OPEN_FILES)(self._open)

    def _open(self, number: int) -> pads.ParquetFileFragment:
        file = self._files[number]
        self._check_size(file)
        fragment = FORMAT.make_fragment(f"{self._root}/{file.path}", self._filesystem, file_size=file.size)
        storage.retried(f"read the footer of {file.path}", fragment.ensure_complete_metadata)
        return fragment

    def _check_size(self, file: TableFile) -> None:
        """Raise ArrowInvalid or FileNotFoundError unless the file has the size that the manifest states.

        Arrow must never be given too large a size: bytes of a range that S3 does not send keep the buffer's old
        content, which may be the end of a file read before, with valid checksums.
        """
        path = f"{self._root}/{file.path}"
        found = storage.retried(f"look for {file.path}", lambda: self._filesystem.get_file_info(path))
        if found.type != pyarrow.fs.FileType.File:
            raise FileNotFoundError(f"{path} is missing")
        if found.size != file.size:
            raise pa.ArrowInvalid(f"it has {found.size} bytes, its manifest says {file.size}")

    @cached_property
    def _schema(self) -> pa.Schema:
        """Schema that every row must have: the columns of the first file that can be opened."""
        for number in range(len(self._files)):
            try:
                schema = self._fragment(number).physical_schema
                return pa.schema([schema.field(name) for name in self._columns])
            except (pa.ArrowException, OSError) as error:
                _raise_unless_damage(error)
        raise DamagedDataError(f"No file of {self._root} can be read. Write the table again.")

    def first_rows_of_files(self) -> list[int]:
        """First row of each file that is not empty."""
        starts = np.cumsum([0, *(file.rows for file in self._files)])
        return [int(start) for start, file in zip(starts, self._files, strict=False) if file.rows]

    def groups_of(self, rows: np.ndarray) -> np.ndarray:
        """For each row, the number (int64) of its row group, counted over the whole table."""
        runs = np.searchsorted(self._run_rows, rows, side="right") - 1
        return self._run_groups[runs] + (rows - self._run_rows[runs]) // self._run_sizes[runs]

    def row_groups(self, first: int, last: int) -> list[RowGroup]:
        """Row groups `first` to `last` inclusive, counted over the whole table."""
        groups = np.arange(first, last + 1)
        runs = np.searchsorted(self._run_groups, groups, side="right") - 1
        files, sizes = self._run_files[runs], self._run_sizes[runs]
        numbers = groups - self._run_groups[np.searchsorted(self._run_files, files)]
        firsts = self._run_rows[runs] + (groups - self._run_groups[runs]) * sizes
        return list(map(RowGroup, files.tolist(), numbers.tolist(), firsts.tolist(), (firsts + sizes).tolist()))

    def read(self, first: int, end: int) -> RowRange:
        """Rows `first` to `end` - 1.

        Raises:
            StorageError: the storage does not answer, or refuses.
        """
        pieces: list[tuple[list[RowGroup], pa.Table | str]] = []
        groups = self.row_groups(*self.groups_of(np.array([first, end - 1])).tolist())
        for _, of_file in groupby(groups, key=lambda group: group.file):
            inside = list(of_file)
            whole = self._read_groups(inside)
            if isinstance(whole, str) and (len(inside) > 1 or self._is_remote):
                # Find the damaged groups one by one. What came over a network may have been cut on the way.
                pieces += [([group], self._read_groups([group])) for group in inside]
            else:
                pieces.append((inside, whole))
        tables, reasons, places, filled = [], {}, np.full(end - first, -1, np.int64), 0
        for inside, piece in pieces:
            start = inside[0].first
            low_row, high_row = max(start, first), min(inside[-1].end, end)
            if isinstance(piece, str):
                reasons |= dict.fromkeys(range(low_row, high_row), piece)
                continue
            part = piece.slice(low_row - start, high_row - low_row)
            tables.append(part)
            places[low_row - first : high_row - first] = np.arange(filled, filled + part.num_rows)
            for offset in _not_finite(part):
                reasons[low_row + int(offset)] = f"not_finite: a number in {self._files[inside[0].file].path}"
                places[low_row + int(offset) - first] = -1
            filled += part.num_rows
        table = pa.concat_tables(tables) if tables else pa.Table.from_pylist([], self._schema)
        return RowRange(first, table, places, reasons)

    def _read_groups(self, groups: list[RowGroup]) -> pa.Table | str:
        """The rows of row groups of one file, or the reason why they cannot be read."""
        path = self._files[groups[0].file].path
        try:
            fragment = self._fragment(groups[0].file).subset(row_group_ids=[group.number for group in groups])
            expected = self._schema
            found = pa.schema([fragment.physical_schema.field(name) for name in self._columns])
            if not found.equals(expected, check_metadata=True):
                return f"wrong_shape: {path} holds {_types(found)}, the table's other files {_types(expected)}"
            table = storage.retried(
                f"read rows of {path}",
                lambda: fragment.to_table(columns=self._columns, use_threads=False),
            )
            rows = groups[-1].end - groups[0].first
            return table if table.num_rows == rows else f"unreadable: {path} holds other rows than its manifest says"
        except KeyError as error:
            return f"wrong_shape: {path} has no column {error}"
        except (pa.ArrowException, OSError) as error:
            _raise_unless_damage(error)
            return f"unreadable: {path}: {' '.join(str(error).split())[:200]}"


def _raise_unless_damage(error: Exception) -> None:
    """Re-raise an error of the storage itself: it does not mean that the data are damaged."""
    if isinstance(error, PermissionError) or ("AWS Error" in str(error) and not isinstance(error, FileNotFoundError)):
        raise error


def _types(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type} {dict(field.metadata or {})}" for field in schema)


def _not_finite(table: pa.Table) -> np.ndarray:
    """Row numbers with an infinity or a NaN in any array column."""
    bad = np.zeros(table.num_rows, bool)
    for name in table.column_names:
        if is_array(field := table.schema.field(name)) and array_kind(field)[1].kind == "f":
            start = 0
            for chunk in table.column(name).chunks:
                bad[start : start + len(chunk)] |= _hold_no_number(array_bytes(chunk), array_kind(field)[1])
                start += len(chunk)
    return np.flatnonzero(bad)


def _hold_no_number(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Whether each row holds an infinity or a NaN, that is, a number with all exponent bits set.

    Tests the bits, a few rows at a time so that they stay in the cache: 13 times as fast as `np.isfinite` on float16.
    """
    integer = np.dtype(f"u{dtype.itemsize}").type
    magnitude, least = integer(np.iinfo(integer).max >> 1), np.array(np.inf, dtype).view(integer)
    values, found = rows.view(integer), np.empty(len(rows), bool)
    step = max(1, 2**19 // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        found[part] = (values[part] & magnitude).max(1) >= least
    return found


def read_rows(reader: TableReader, first: int, end: int) -> pa.Table:
    """Rows `first` to `end` - 1, all of them.

    Raises:
        DamagedDataError: one of them cannot be used.
    """
    found = reader.read(first, end)
    if found.reasons:
        row, reason = min(found.reasons.items())
        raise DamagedDataError(f"row {row}: {reason}. Write the table again.")
    return found.table


def read_columns(uri: str, manifest: Manifest, columns: Sequence[str]) -> pa.Table:
    """Small columns of a whole table, a file at a time.

    Raises:
        DamagedDataError: a row cannot be used.
    """
    return read_rows(TableReader(uri, manifest, columns), 0, manifest.num_rows)


class RowReader:
    """Reads any rows of a table in any order."""

    def __init__(self, uri: str, manifest: Manifest, columns: Sequence[str]) -> None:
        self._reader = TableReader(uri, manifest, columns)

    def read(self, rows: np.ndarray) -> pa.Table:
        """The given rows, in the given order.

        Raises:
            DamagedDataError: one of the rows cannot be used.
        """
        groups, ranges = self._reader.groups_of(rows), dict[int, RowRange]()
        for number in np.unique(groups).tolist():
            (group,) = self._reader.row_groups(number, number)
            ranges[number] = self._reader.read(group.first, group.end)
        starts, filled, tables = {}, 0, []
        for group, found in ranges.items():
            starts[group], filled = filled, filled + found.table.num_rows
            tables.append(found.table)
        places = []
        for row, group in zip(rows.tolist(), groups.tolist(), strict=True):
            found = ranges[group]
            if row in found.reasons:
                raise DamagedDataError(f"row {row}: {found.reasons[row]}. Write the table again.")
            places.append(starts[group] + int(found.places[row - found.first]))
        return pa.concat_tables(tables).take(pa.array(places, pa.int64())).combine_chunks()
