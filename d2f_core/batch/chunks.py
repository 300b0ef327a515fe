"""The stages of a table job around its actors: read and prepare before them, write after them; one row per chunk.

A chunk is passed on as a whole, so that forward passes and files are determined by the input, never by how Ray
schedules or bundles rows. Nothing here imports torch, which would slow the start of every task process.
"""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa

from d2f_core.batch.chunk_records import ChunkRecord, write_chunk
from d2f_core.batch.refusals import refusal_or_raise
from d2f_core.batch.table_spec import TableSpec
from d2f_core.data.arrays import arrays_to_table
from d2f_core.data.errors import BadSampleError
from d2f_core.data.quarantine import DUPLICATE, BadSample
from d2f_core.data.schema import ROW_GROUP_ROWS, array_kind, is_array
from d2f_core.data.sources.sample import Sample, Shard

PACKED_SCHEMA = pa.schema([("record", pa.string()), ("table", pa.binary()), ("problem", pa.string())])
"""`problem` stops the job. It is passed as data because Ray keeps only the traceback's text of an exception."""


def pack(record: ChunkRecord, table: pa.Table, *, problem: str | None = None) -> pa.Table:
    """Serialise a chunk to a table of one row."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue()
    ends = pa.py_buffer(np.array([0, content.size], np.int32))
    packed = pa.Array.from_buffers(pa.binary(), 1, [None, ends, content])  # zero-copy
    return pa.table([[record.to_json()], packed, [problem]], schema=PACKED_SCHEMA)


def unpack(row: pa.Table) -> tuple[ChunkRecord, pa.Table]:
    """The chunk in a one-row table of `pack`; its columns are not copied."""
    record = ChunkRecord.from_json(row["record"][0].as_py())
    return record, pa.ipc.open_stream(row["table"][0].as_buffer()).read_all()


class TableActor(ABC):
    """Ray Data actor of a table job: prepared rows of a chunk -> rows of the table."""

    @abstractmethod
    def __init__(self, spec: Any) -> None:
        """Load the model once; `spec` is the job's own subclass of TableSpec."""

    @abstractmethod
    def make(self, prepared: pa.Table) -> pa.Table:
        """The finished rows, in the order of `prepared`; their columns include `sample_id` and `source_uri`.

        Raises:
            TableJobError: the job cannot continue.
        """

    def __call__(self, row: pa.Table) -> pa.Table:
        record, prepared = unpack(row)
        try:
            return pack(record, self.make(prepared))
        except ValueError as error:
            return refused(row, refusal_or_raise(error))


def refused(row: pa.Table, problem: str) -> pa.Table:
    """A chunk without rows, and why the job stops."""
    record, prepared = unpack(row)
    return pack(record, prepared.slice(0, 0), problem=problem)


class LoadedActor:
    """Ray Data's actor: the job's own, or what its constructor refused."""

    def __init__(self, actor: type[TableActor], spec: TableSpec) -> None:
        self._problem = None
        try:
            self._actor = actor(spec)
        except ValueError as error:
            self._problem = refusal_or_raise(error)

    def __call__(self, row: pa.Table) -> pa.Table:
        return self._actor(row) if self._problem is None else refused(row, self._problem)


MAX_CHUNK_BYTES = 512 * 2**20
"""A chunk ends early once its files, such as images that are stored as they are, have so many bytes: what is passed on
in one piece may not have 2 GiB, and is in memory several times."""


def prepare_chunk(
    samples: Iterable[Sample], spec: TableSpec, *, known: Container[str] = (), **where: Any
) -> Iterator[tuple[ChunkRecord, pa.Table]]:
    """Check and prepare a chunk's samples; of equal samples, the first usable one is kept.

    Args:
        samples: those of the chunk; no more of them is taken once `MAX_CHUNK_BYTES` are reached.
        known: ids of the samples that a growing table has; they are named in the record, and not prepared.
        where: the record's `shard`, `number` and `last`.

    Yields:
        The chunk in one part for each of the spec's tables that it has rows of, or one part without rows.
    """
    good: list[dict[str, Any]] = []
    bad: list[BadSample] = []
    there: dict[str, str] = {}
    read, size = 0, 0
    seen: dict[str, str] = {}
    for sample in samples:
        name, read = None, read + sample.rows
        try:
            if sample.problem:
                raise BadSampleError(sample.problem)
            name = spec.identify(sample)
            if name in seen:
                raise BadSampleError(f"{DUPLICATE}: of {seen[name]}")
            if name in known:
                seen[name] = there[name] = sample.source_uri
                continue
            row = {"sample_id": name, "source_uri": sample.source_uri, **spec.prepare(sample)}
            good.append(row)
            size += sum(len(value) for value in row.values() if isinstance(value, bytes))
            # Only after success: an image with broken depth may occur again with good depth.
            seen[name] = sample.source_uri
        except BadSampleError as error:
            bad.append(BadSample(source_uri=sample.source_uri, sample_id=name, reason=str(error), rows=sample.rows))
        if size >= MAX_CHUNK_BYTES:
            break
    names = [spec.table_of(row) for row in good]
    tables = [name for name in spec.tables if name in names] or [""]
    counted: dict[str, Any] = {"read": read, "bad": tuple(bad)}
    counted |= {"known_ids": tuple(there), "known_places": tuple(there.values())}
    for part, table in enumerate(tables):
        rows = [row for row, name in zip(good, names, strict=True) if name == table]
        record = ChunkRecord(**where, **counted, table=table, part=part, parts=len(tables))
        yield record, _table(rows, spec.of_table(table))
        counted = {"read": 0, "bad": ()}  # what was read is counted with the first part alone


def _table(good: Sequence[dict[str, Any]], spec: TableSpec) -> pa.Table:
    columns: dict[str, Any] = {}
    schema = spec.prepared_schema()
    for column in schema:
        values = [row[column.name] for row in good]
        columns[column.name] = _stacked(values, column) if is_array(column) else values
    return arrays_to_table(columns, schema)


def _stacked(values: list[Any], column: pa.Field) -> np.ndarray:
    shape, dtype = array_kind(column)
    return np.stack(values).astype(dtype, copy=False) if values else np.empty((0, *shape), dtype)


def work_item(number: int, shard: Shard, done: Mapping[int, int]) -> dict[str, Any]:
    """The input row for one shard; chunks in `done`, by number with how many samples each took, are skipped."""
    return {"shard": number, "work": pickle.dumps((shard, done))}


def prepare_shards(rows: pa.Table, *, spec: TableSpec, known: Container[str] = ()) -> Iterator[pa.Table]:
    """Read the shards of work items, and yield their prepared chunks; of `known` samples only the ids."""
    size = spec.config.rows_per_part
    for item in rows.to_pylist():
        shard, done = pickle.loads(item["work"])  # pickled by this job's driver
        samples = shard.read()
        number, upcoming = 0, next(samples, None)
        while number == 0 or upcoming is not None:
            chunk = chain([] if upcoming is None else [upcoming], samples)
            if number in done:
                upcoming = next(islice(chunk, done[number], None), None)
            else:
                where = {"shard": item["shard"], "number": number}
                parts = list(prepare_chunk(islice(chunk, size), spec, known=known, **where, last=False))
                upcoming = next(samples, None)
                for record, table in parts:
                    yield pack(replace(record, last=upcoming is None), table)
            number += 1


def write_row(row: pa.Table, *, output: str, row_group_rows: int = ROW_GROUP_ROWS) -> pa.Table:
    """Write one finished chunk; only its record is sent to the driver. A chunk with a problem is not written."""
    record, table = unpack(row)
    problem = row["problem"][0].as_py()
    if problem is None:
        record = write_chunk(output, record, table, row_group_rows=row_group_rows)
    return pa.table({"record": [record.to_json()], "problem": pa.array([problem], pa.string())})
