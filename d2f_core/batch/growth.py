"""A further version of a finished table whose source has changed: what the source holds is compared with the rows by
their ids; new samples are made, and all other rows are taken over.

    OUTPUT/_growing/                  the new samples' chunks and records, like a table job of its own, until the
                                      version is there
    OUTPUT/part-v2-NNNNNN.parquet     rows of version 2 that are new, close together
    OUTPUT/part-v2-of-NNNNNN.parquet  what is left of file NNNNNN of the version before, if it lost rows

Files of which all rows stay are listed as they are. So the order of rows is: those of the version before, in their
order, then the new ones in the order of the source, whatever the number of workers.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.batch.chunk_records import (
    READ_THREADS,
    ChunkRecord,
    first_of_each,
    in_order,
    ledger,
    read_places,
    stored_record,
)
from d2f_core.batch.output import map_ahead, threads_for
from d2f_core.batch.table_claim import SOURCE_DIGEST, begun_identity
from d2f_core.batch.table_spec import TableJobError, TableSpec
from d2f_core.data.manifest import Manifest, TableFile, read_file, write_part
from d2f_core.data.quarantine import DUPLICATE, BadSample, read_quarantine
from d2f_core.data.sources.listing import SourcePlan
from d2f_core.storage import join, read_bytes

GROWING = "_growing"


class KnownIds:
    """Ids of the rows that a table has, in 32 bytes each."""

    def __init__(self, ids: np.ndarray) -> None:
        self._ids = np.unique(ids)

    def __contains__(self, name: str) -> bool:
        wanted = name.encode()
        place = int(np.searchsorted(self._ids, wanted))
        return place < len(self._ids) and self._ids[place] == wanted


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What a further version consists of."""

    files: tuple[TableFile, ...]
    records: Sequence[ChunkRecord]
    """Of all chunks of the source, with all that was left out."""
    bad: Sequence[BadSample]
    new: int
    removed: int
    unchanged: int

    def __str__(self) -> str:
        return f"{self.new} new, {self.removed} removed, {self.unchanged} unchanged"


def row_ids(output: str, manifest: Manifest) -> np.ndarray:
    """Ids of all rows, bytes [rows], in the table's order."""
    return np.array([name.encode() for name in _column(output, manifest, "sample_id")], np.bytes_)


def _column(output: str, manifest: Manifest, name: str) -> list[str]:
    """Texts of a column, in the table's order."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        tables = pool.map(lambda file: read_places(join(output, file.path), (name,)), manifest.files)
        return [text for table in tables for text in table.column(name).to_pylist()]


def growing_spec(spec: TableSpec, before: Manifest) -> TableSpec:
    """The job of the new samples' chunks: of this version before, in a place inside the output."""
    place = join(spec.config.output, GROWING)
    config = replace(cast(Any, spec.config), output=place)
    return replace(spec, config=config, inputs={**spec.inputs, "version_before": before.digest})


def begun_growth(place: str, before: Manifest) -> dict[str, Any] | None:
    """The identity of an unfinished growth; None where there is none, or only what is left of one whose version is
    there, as the job was killed before it could remove that.
    """
    begun = begun_identity(place)
    return None if begun and begun[SOURCE_DIGEST] == before.inputs[SOURCE_DIGEST] else begun


def foreseen(spec: TableSpec, source: SourcePlan, before: Manifest) -> str:
    """What can be said of the source's changes before it is read: by the samples' places, or else by their number."""
    names = source.names
    if names is None:
        count = "an unknown number of" if source.num_rows is None else str(source.num_rows)
        return f"it holds {count} samples now, and held {before.counts['read']}"
    output = spec.config.output
    rows, left_out = set(_column(output, before, "source_uri")), set[str]()
    with contextlib.suppress(FileNotFoundError):  # a ledger may have been taken away; it belongs to no version
        left_out = {bad.source_uri for bad in read_quarantine(output)}
    new, removed = len(names - rows - left_out), len(rows - names)
    return f"by their places {new} samples are new, {removed} removed, {len(rows & names)} unchanged"


def compare(spec: TableSpec, before: Manifest, version: int, place: str, records: Iterable[ChunkRecord]) -> Growth:
    """Write the files of a further version; safe to repeat.

    Args:
        place: where the new samples' chunks are.
        records: of all chunks of the source.

    Raises:
        TableJobError: more rows would be lost than the spec allows.
    """
    output, ordered = spec.config.output, sorted(records, key=in_order)
    is_new = first_of_each([record.sample_ids for record in ordered])
    again, known_places = _known_again(place, ordered)
    found = np.array([name.encode() for record in ordered for name in record.known_ids], np.bytes_)
    stays = np.isin(row_ids(output, before), found)
    if (removed := int((~stays).sum())) > spec.max_removed_share * len(stays):
        raise TableJobError(
            f"{removed} of the {len(stays)} samples in {output!r} are not in {spec.inputs['source']!r} any more, and "
            f"max_removed_share={spec.max_removed_share:g} allows fewer. Check that the source is whole; or raise the "
            "limit, and the same command goes on from here."
        )
    files = [*_remaining(spec, before, stays, version), *_packed(spec, place, ordered, is_new, version)]
    told = [
        replace(record, bad=(*record.bad, *_dropped(place, record, kept), *again.get(number, ())))
        for number, (record, kept) in enumerate(zip(ordered, is_new, strict=True))
    ]
    return Growth(
        files=tuple(files),
        records=told,
        bad=ledger(place, told, known_places),
        new=sum(int(kept.sum()) for kept in is_new),
        removed=removed,
        unchanged=int(stays.sum()),
    )


def _dropped(place: str, record: ChunkRecord, kept: np.ndarray) -> list[BadSample]:
    """The new samples of a chunk that an earlier chunk has too."""
    if kept.all():
        return []
    rows = read_places(join(place, record.part_name)).filter(pa.array(~kept)).to_pylist()
    return [BadSample(**row, reason=DUPLICATE) for row in rows]


def _known_again(place: str, ordered: Sequence[ChunkRecord]) -> tuple[dict[int, list[BadSample]], dict[str, str]]:
    """Known samples that an earlier chunk of the source has too, by the number of their record; and the places of those
    that came first, by id. Places are read only of chunks with such samples.
    """
    is_first = first_of_each([record.known_ids for record in ordered])
    repeated = {name for record, first in zip(ordered, is_first, strict=True) for name in _chosen(record, ~first)}
    again: dict[int, list[BadSample]] = {}
    places: dict[str, str] = {}
    for number, record in enumerate(ordered):
        if repeated.isdisjoint(record.known_ids):
            continue
        for name, uri in zip(record.known_ids, stored_record(place, record).known_places, strict=True):
            if name in places:
                again.setdefault(number, []).append(BadSample(source_uri=uri, sample_id=name, reason=DUPLICATE))
            elif name in repeated:
                places[name] = uri
    return again, places


def _chosen(record: ChunkRecord, which: np.ndarray) -> list[str]:
    return [record.known_ids[place] for place in np.flatnonzero(which).tolist()]


def _remaining(spec: TableSpec, before: Manifest, stays: np.ndarray, version: int) -> Iterator[TableFile]:
    """The files of the version before: as they are, or what is left of them, written anew.

    Args:
        stays: bool [rows of the version before].
    """
    output, first = spec.config.output, 0
    items: list[tuple[int, TableFile, np.ndarray]] = []
    for number, file in enumerate(before.files):
        kept = stays[first : first + file.rows]
        first += file.rows
        if kept.any():
            items.append((number, file, kept))

    def remaining(item: tuple[int, TableFile, np.ndarray]) -> TableFile:
        number, file, kept = item
        if kept.all():
            return file
        table = pq.read_table(pa.BufferReader(read_file(output, file))).filter(pa.array(kept))
        name = f"part-v{version}-of-{number:06d}.parquet"
        return write_part(output, name, table, row_group_rows=spec.row_group_rows)

    largest = max((file.size for file in before.files), default=1)
    return map_ahead(remaining, items, threads_for(largest))


def _packed(
    spec: TableSpec, place: str, ordered: Sequence[ChunkRecord], is_new: Sequence[np.ndarray], version: int
) -> Iterator[TableFile]:
    """The new rows in files of `rows_per_part`: few samples are new in each chunk, and a reader wants long runs."""

    def rows_of(item: tuple[ChunkRecord, np.ndarray]) -> pa.Table:
        record, kept = item
        return pq.read_table(pa.BufferReader(read_bytes(join(place, record.part_name)))).filter(pa.array(kept))

    written = [(record, kept) for record, kept in zip(ordered, is_new, strict=True) if kept.any()]
    tables = map_ahead(rows_of, written, 2)
    for number, table in enumerate(_regrouped(tables, spec.config.rows_per_part)):
        name = f"part-v{version}-{number:06d}.parquet"
        yield write_part(spec.config.output, name, table, row_group_rows=spec.row_group_rows)


def _regrouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of so many rows; the last may have fewer."""
    waiting = None
    for table in tables:
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        while waiting.num_rows >= rows:
            yield waiting.slice(0, rows)
            waiting = waiting.slice(rows)
    if waiting is not None and waiting.num_rows:
        yield waiting
