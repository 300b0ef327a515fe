"""What a table consists of: its files with sizes and hashes, what it was made from, and how.

A table is `URI/part-*.parquet` plus `URI/manifest.json`. The manifest is written last, and only once: without it the
table does not exist, with it the table is complete and never changes. A source that grew makes a further version
(`table_versions`), with a manifest of its own.

The size of a manifest, and the time to read it, are proportional to the number of files, because a file's row groups
are run-length encoded. A thousand million rows in 20,000 files are 4 MB of JSON, where one number per row group would
be 60 MB.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.schema import READABLE_VERSIONS, ROW_GROUP_ROWS, SCHEMA_VERSION, written_version
from d2f_core.data.table_versions import MANIFEST_NAME, newest_version, versioned
from d2f_core.identity import canonical_json
from d2f_core.s3_calls import fetched_whole
from d2f_core.storage import exists, join, read_bytes, write_bytes

NOT_JSON = (json.JSONDecodeError, UnicodeDecodeError)
KIND_RULE = "[a-z][a-z0-9_]*"
ROW_GROUP_BYTES = 8 * 2**20
"""Largest row group of large rows, in bytes: the least that a reader can fetch."""


class ManifestError(ValueError):
    """A manifest that cannot be read, or that contradicts what is to be written."""


class ManifestNotFoundError(ManifestError):
    """No manifest exists: the table was never finished."""


Runs = tuple[tuple[int, int], ...]
"""Row groups of a file in order, run-length encoded: (rows per group, number of groups)."""

Buckets = tuple[tuple[str, int], ...]
"""The buckets of a table in row order: (value, number of rows). The rows of a bucket are consecutive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFile:
    """One parquet file of a table."""

    path: str
    """Path relative to the table's URI."""
    rows: int
    size: int
    """File size in bytes."""
    sha256: str
    row_groups: Runs

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TableFile":
        """Inverse of `dataclasses.asdict`; also reads schema version 2, which listed the rows of every row group."""
        groups = content["row_groups"]
        listed = groups and isinstance(groups[0], int)
        return cls(**{**content, "row_groups": run_lengths(groups) if listed else tuple(map(tuple, groups))})


def run_lengths(row_groups: Iterable[int]) -> Runs:
    """Run-length encode the rows of each row group."""
    return tuple((rows, sum(1 for _ in equal)) for rows, equal in groupby(row_groups))


def bucket_runs(values: Iterable[str]) -> Buckets:
    """The buckets of a table whose bucket column holds these values, in row order.

    Raises:
        ManifestError: the rows with one value are not consecutive.
    """
    runs = tuple((value, sum(1 for _ in equal)) for value, equal in groupby(values))
    _check_buckets(runs)
    return runs


def _check_buckets(buckets: Buckets) -> None:
    """Raise ManifestError unless each value is a string and has exactly one run of at least one row."""
    seen = set[str]()
    for value, rows in buckets:
        if not isinstance(value, str) or not isinstance(rows, int) or rows < 1:
            raise ManifestError(f"buckets: ({value!r}, {rows!r}) must be a text and a number of rows from 1 on.")
        if value in seen:
            raise ManifestError(
                f"buckets: the rows of {value!r} lie apart. Rows of one bucket must be consecutive: sort the rows by "
                "their bucket before they are written."
            )
        seen.add(value)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete table."""

    kind: str
    """Kind of the rows, named by the system that writes them: `images`, `latents`, `key_points`."""
    files: tuple[TableFile, ...]
    """The table's files, in row order."""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    """Properties that a reader must match, such as the autoencoder of a latent table."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """What the table was made from: source, configuration, versions."""
    counts: dict[str, int] = field(default_factory=dict)
    """Sample counts; for a job over a source: read = written + quarantined. `duplicates` counts among the
    quarantined."""
    buckets: Buckets = ()
    """Runs of rows that may share a micro-batch (see `table_plan`); most tables have none. They determine the sample
    order, so they are part of the digest; a manifest without buckets is written without the field."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or not re.fullmatch(KIND_RULE, self.kind):
            raise ManifestError(
                f"kind={self.kind!r} does not match {KIND_RULE}. Name the kind of table in lower-case letters, digits "
                "and underscores, such as 'images' or 'key_points'."
            )
        for file in self.files:
            if sum(rows * count for rows, count in file.row_groups) != file.rows:
                raise ManifestError(
                    f"{file.path}: its row groups (rows, count) {str(file.row_groups)[:200]} do not add up to "
                    f"{file.rows} rows. Write the table again."
                )
        _check_buckets(self.buckets)
        bucketed = sum(rows for _, rows in self.buckets)
        if self.buckets and bucketed != self.num_rows:
            raise ManifestError(
                f"buckets: {len(self.buckets)} buckets have {bucketed} rows, the files have {self.num_rows}. Every row "
                "belongs to one bucket: give them all, in row order."
            )

    @property
    def num_rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def row_bytes(self) -> int:
        """Bytes per row over all columns: the mean of the file with the largest rows; 0 for an empty table."""
        return max((-(-file.size // file.rows) for file in self.files if file.rows), default=0)

    @property
    def digest(self) -> str:
        """Hash of the table's content: its files, kind, encoder and buckets, not how or when it was made."""
        text = hashlib.sha256(b'{"files":[')
        for number, file in enumerate(self.files):
            text.update(b"," * bool(number) + _listing_all_groups(file))
        rest = {"fingerprint": self.fingerprint, "kind": self.kind}
        text.update(b"]," + canonical_json(rest | ({"buckets": self.buckets} if self.buckets else {}))[1:])
        return text.hexdigest()


def _listing_all_groups(file: TableFile) -> bytes:
    """A file's entry as canonical JSON of schema version 2, so that digests recorded by earlier jobs stay valid.

    Formatted by hand: through `json`, a table of 1e9 rows would take seconds.
    """
    path, sha256 = (json.dumps(text, ensure_ascii=False) for text in (file.path, file.sha256))
    groups = "".join(f"{rows}," * count for rows, count in file.row_groups)[:-1]
    text = f'{{"path":{path},"row_groups":[{groups}],"rows":{file.rows},"sha256":{sha256},"size":{file.size}}}'
    return text.encode()


def manifest_exists(uri: str) -> bool:
    """Whether the table at `uri` is complete."""
    return exists(join(uri, MANIFEST_NAME))


def read_manifest(uri: str, version: int | None = None) -> Manifest:
    """The manifest of the table at `uri`, of its newest version unless another is named.

    Raises:
        ManifestNotFoundError: no manifest exists there.
        ManifestError: the file is no manifest, or has another schema version.
    """
    place = join(uri, versioned(MANIFEST_NAME, version or newest_version(uri)))
    try:
        content = fetched_whole(place, lambda: json.loads(read_bytes(place, small=True)), NOT_JSON)
    except FileNotFoundError:
        raise ManifestNotFoundError(
            f"{uri!r} has no {place[len(uri) :].strip('/')}: no table, or one that was not finished. Run the job that "
            "writes it."
        ) from None
    except NOT_JSON as error:
        raise ManifestError(f"{place!r} is not JSON ({error}). Remove the table and write it again.") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version not in READABLE_VERSIONS:
        raise ManifestError(
            f"{place!r} has schema_version={version}; {', '.join(map(str, READABLE_VERSIONS))} can be read. Write "
            "the table again, or read it with the release that wrote it."
        )
    try:
        files = tuple(map(TableFile.from_json, content.pop("files")))
        buckets = tuple(map(tuple, content.pop("buckets", ())))
        return Manifest(**{**content, "files": files, "buckets": buckets, "schema_version": SCHEMA_VERSION})
    except ManifestError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{place!r} is not a table's manifest ({error}). Write the table again.") from None


def read_file(uri: str, file: TableFile) -> bytes:
    """The bytes of one file of the table at `uri`, checked against its manifest.

    Raises:
        ManifestError: other bytes came, also when they were fetched again.
    """
    place = join(uri, file.path)

    def fetch() -> bytes:
        data = read_bytes(place)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise ManifestError(
                f"{place!r}: {len(data):,} bytes came that are not the {file.size:,} of the table's manifest. Remove "
                "the table and write it again."
            )
        return data

    return fetched_whole(place, fetch, ManifestError)


def write_manifest(uri: str, manifest: Manifest, version: int = 1) -> None:
    """Declare a version of the table at `uri` complete.

    Raises:
        ManifestError: another manifest is there already; an equal one is fine.
    """
    try:
        write_bytes(join(uri, versioned(MANIFEST_NAME, version)), _to_json(manifest).encode(), exclusive=True)
    except FileExistsError:
        if read_manifest(uri, version).digest != manifest.digest:
            raise ManifestError(
                f"{uri!r} is already a complete table with other content. Write to another URI, or remove that one."
            ) from None


def _to_json(manifest: Manifest) -> str:
    """The manifest as JSON with one line per file and per bucket."""
    lists: dict[str, list[Any]] = {"files": [asdict(file) for file in manifest.files]}
    if manifest.buckets:
        lists["buckets"] = list(manifest.buckets)
    rest = asdict(replace(manifest, files=(), buckets=(), schema_version=written_version(manifest.fingerprint)))
    del rest["files"], rest["buckets"]
    line = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode
    lines = {name: ",\n".join(map(line, items)) for name, items in lists.items()}
    text = "".join(f'\n "{name}": [\n{items}\n ],' for name, items in lines.items())
    return "{" + text + json.dumps(rest, indent=1, sort_keys=True, ensure_ascii=False)[1:]


def rows_per_group(row_bytes: int) -> int:
    """How many rows of `row_bytes` bytes a row group should hold: `write_part`'s `row_group_rows`.

    `ROW_GROUP_ROWS` up to 128 KiB a row; of larger rows as many as fit into `ROW_GROUP_BYTES`, but at least one. A
    reader fetches whole row groups, so 64 rows of 2 MB would cost it 128 MB where it wants a single one.
    """
    if row_bytes < 1:
        raise ValueError(f"row_bytes={row_bytes} must be at least 1. Give the bytes of a row, over all columns.")
    return max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // row_bytes))


def write_part(uri: str, name: str, table: pa.Table, *, row_group_rows: int = ROW_GROUP_ROWS) -> TableFile:
    """Write one parquet file of a table, whole or not at all; equal rows give equal bytes.

    Uncompressed, in small row groups: latents and images do not compress, and a few rows can be fetched cheaply.

    Args:
        row_group_rows: rows per row group, the smallest piece that a reader can fetch; `rows_per_group` suggests a
            value for large rows.
    """
    if row_group_rows < 1:
        raise ValueError(f"row_group_rows={row_group_rows} must be at least 1. Use rows_per_group(bytes of a row).")
    sink = pa.BufferOutputStream()
    # A checksum for each page lets a reader of a few row groups find damage without reading the whole file.
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_rows,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    data = sink.getvalue().to_pybytes()
    write_bytes(join(uri, name), data)
    return describe_file(name, data)


def describe_file(name: str, data: bytes) -> TableFile:
    """The manifest's entry for a parquet file of these bytes."""
    metadata = pq.read_metadata(pa.BufferReader(data))
    groups = run_lengths(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
    digest = hashlib.sha256(data).hexdigest()
    return TableFile(path=name, rows=metadata.num_rows, size=len(data), sha256=digest, row_groups=groups)
