"""What a table consists of: its files with their sizes and hashes, what made it, and from what.

A table is `URI/part-*.parquet` plus `URI/manifest.json`. The manifest is written last, and only once: without it the
table does not exist, with it the table is complete and never changes.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.schema import ROW_GROUP_ROWS, SCHEMA_VERSION
from d2f_core.storage import exists, join, read_bytes, write_bytes

MANIFEST_NAME = "manifest.json"
KINDS = ("images", "depth", "latents", "generations", "features")


class ManifestError(ValueError):
    """A manifest that cannot be read, or that contradicts what is to be written."""


class ManifestNotFoundError(ManifestError):
    """There is no manifest: the table was never finished."""


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """One parquet file of a table."""

    path: str
    """Relative to the table's URI."""
    rows: int
    size: int
    """Bytes."""
    sha256: str
    row_groups: tuple[int, ...]
    """Rows of each row group, in order."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete table."""

    kind: str
    """`images`, `depth`, `latents`, `generations` or `features`."""
    files: tuple[TableFile, ...]
    """In row order."""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    """What a reader must match, such as the autoencoder of a latent table."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """What the table was made from: source, configuration, versions."""
    counts: dict[str, int] = field(default_factory=dict)
    """Samples by fate; for a job over a source: read = written + quarantined + duplicates."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ManifestError(f"kind={self.kind!r} is not a kind of table. Known: {', '.join(KINDS)}.")
        for file in self.files:
            if sum(file.row_groups) != file.rows:
                raise ManifestError(f"{file.path}: row groups {file.row_groups} do not add up to {file.rows} rows.")

    @property
    def num_rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def digest(self) -> str:
        """Hash of the table's content: its files, its kind and its encoder, not how or when it was made."""
        content = {"kind": self.kind, "files": [asdict(file) for file in self.files], "fingerprint": self.fingerprint}
        return hashlib.sha256(canonical_json(content)).hexdigest()


def canonical_json(value: object) -> bytes:
    """The one JSON text of a value, for hashing and comparing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def manifest_exists(uri: str) -> bool:
    """Whether the table at `uri` is complete."""
    return exists(join(uri, MANIFEST_NAME))


def read_manifest(uri: str) -> Manifest:
    """The manifest of the table at `uri`.

    Raises:
        ManifestNotFoundError: there is none.
        ManifestError: it is no manifest, or one of a newer schema version.
    """
    place = join(uri, MANIFEST_NAME)
    try:
        content = json.loads(read_bytes(place))
    except FileNotFoundError:
        raise ManifestNotFoundError(
            f"{uri!r} has no {MANIFEST_NAME}: no table, or one that was not finished. Run the job that writes it."
        ) from None
    except ValueError as error:
        raise ManifestError(f"{place!r} is not JSON ({error}). Remove the table and write it again.") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise ManifestError(f"{place!r} has schema_version={version}, not {SCHEMA_VERSION}. Write the table again.")
    try:
        files = tuple(TableFile(**{**file, "row_groups": tuple(file["row_groups"])}) for file in content.pop("files"))
        return Manifest(**content, files=files)
    except (KeyError, TypeError) as error:
        raise ManifestError(f"{place!r} is not a table's manifest ({error}). Write the table again.") from None


def write_manifest(uri: str, manifest: Manifest) -> None:
    """Declare the table at `uri` complete.

    Raises:
        ManifestError: another manifest is there already; an equal one is fine.
    """
    text = json.dumps(asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False).encode()
    try:
        write_bytes(join(uri, MANIFEST_NAME), text, exclusive=True)
    except FileExistsError:
        if read_manifest(uri).digest != manifest.digest:
            raise ManifestError(
                f"{uri!r} is already a complete table with other content. Write to another URI, or remove that one."
            ) from None


def write_part(uri: str, name: str, table: pa.Table) -> TableFile:
    """Write one parquet file of a table, whole or not at all; equal rows give equal bytes.

    Uncompressed, in row groups of `ROW_GROUP_ROWS`: latents and images do not shrink, and few rows are fetched cheaply.
    """
    sink = pa.BufferOutputStream()
    # A checksum for each page lets a reader of a few row groups find damage without reading the whole file.
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_ROWS,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    data = sink.getvalue().to_pybytes()
    full, rest = divmod(table.num_rows, ROW_GROUP_ROWS)
    groups = (ROW_GROUP_ROWS,) * full + ((rest,) if rest else ())
    write_bytes(join(uri, name), data)
    digest = hashlib.sha256(data).hexdigest()
    return TableFile(path=name, rows=table.num_rows, size=len(data), sha256=digest, row_groups=groups)
