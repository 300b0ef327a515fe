"""Records of the finished chunks of a table job, stored beside its parts, and the step from parts to a table.

    OUTPUT/part-SSSSSS-NNNNN.parquet          chunk N of shard S, written first, whole
    OUTPUT/_progress/SSSSSS-NNNNN.json        its record, written second: the chunk is done
    OUTPUT/_progress/job.json                 what the job is; another job is refused
    OUTPUT/quarantine.parquet, manifest.json  written at the end; then _progress is removed

    OUTPUT/TABLE/part-SSSSSS-NNNNN.parquet    of a job that writes several tables: the chunk's part of each, with a
    OUTPUT/_progress/SSSSSS-NNNNN-TABLE.json  record of its own

A record counts only while its part exists with the size in the record, and a chunk's records only if all are there.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.manifest import TableFile, write_part
from d2f_core.data.quarantine import DUPLICATE, BadSample
from d2f_core.data.schema import ROW_GROUP_ROWS
from d2f_core.storage import arrow_filesystem, filesystem, join, list_names, read_bytes, retried, write_bytes

PROGRESS = "_progress"
JOB_NAME = "job.json"
READ_THREADS = 16
PLACE_COLUMNS = ("sample_id", "source_uri")


@dataclass(frozen=True, kw_only=True)
class ChunkRecord:
    """Record of one chunk: up to `rows_per_part` consecutive samples of one shard."""

    shard: int
    number: int
    """Number of the chunk within its shard."""
    last: bool
    """Whether the chunk is the last of its shard."""
    read: int
    """Number of samples read, including all those that one ledger entry stands for."""
    bad: tuple[BadSample, ...]
    """Samples left out. Of a duplicate of another chunk's sample, the reason is only its code, to which `ledger` adds
    the place of the sample that was kept."""
    sample_ids: tuple[str, ...] = ()
    """Sample ids of the part's rows."""
    file: TableFile | None = None
    """The chunk's part; None if no sample is usable."""
    table: str = ""
    """Table below the output that the part belongs to; empty: the output itself."""
    part: int = 0
    """Number of the record among those of its chunk; the first counts all that was read."""
    parts: int = 1
    """Records of the chunk."""
    known_ids: tuple[str, ...] = ()
    """Ids of samples whose rows the table had before it grew."""
    known_places: tuple[str, ...] = ()
    """Their places in the source; empty where only the ids are kept, because a driver holds all records."""

    @property
    def chunk(self) -> str:
        return f"{self.shard:06d}-{self.number:05d}"

    @property
    def name(self) -> str:
        return f"{self.chunk}-{self.table}" if self.table else self.chunk

    @property
    def part_name(self) -> str:
        """Path of the part, relative to the output."""
        return join(self.table, f"part-{self.chunk}.parquet") if self.table else f"part-{self.chunk}.parquet"

    @property
    def samples(self) -> int:
        """Number of the shard's samples that this part of the chunk took, each line of the ledger being one."""
        return len(self.sample_ids) + len(self.known_ids) + len(self.bad)

    @property
    def unusable(self) -> int:
        """Number of samples that are lost; duplicates do not count."""
        return sum(bad.rows for bad in self.bad if bad.code != DUPLICATE)

    def without_places(self) -> "ChunkRecord":
        return replace(self, known_places=())

    def to_json(self) -> str:
        content = asdict(self)
        if not self.table:  # as it was before a job could write several
            del content["table"], content["part"], content["parts"]
        if not self.known_ids:  # as earlier releases wrote it
            del content["known_ids"], content["known_places"]
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str | bytes) -> "ChunkRecord":
        content = json.loads(text)
        file = content.pop("file")
        content["file"] = TableFile.from_json(file) if file else None
        content["bad"] = tuple(BadSample(**bad) for bad in content["bad"])
        lists = ("sample_ids", "known_ids", "known_places")
        return cls(**{**content, **{name: tuple(content.get(name, ())) for name in lists}})


def write_chunk(
    output: str, record: ChunkRecord, table: pa.Table, *, row_group_rows: int = ROW_GROUP_ROWS
) -> ChunkRecord:
    """Write a chunk's part, then its record; a chunk without rows has no part."""
    part = record.part_name
    file = write_part(output, part, table, row_group_rows=row_group_rows) if table.num_rows else None
    record = replace(record, file=file, sample_ids=tuple(table.column("sample_id").to_pylist()))
    write_bytes(join(output, PROGRESS, f"{record.name}.json"), record.to_json().encode())
    return record


def read_records(output: str) -> list[ChunkRecord]:
    """Records of the finished chunks: those whose part exists in full size."""
    names = [name for name in list_names(join(output, PROGRESS)) if name.endswith(".json") and name != JOB_NAME]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        texts = pool.map(lambda name: read_bytes(join(output, PROGRESS, name)), names)
        # Older records count duplicates without naming them; such a chunk is made again.
        records = [ChunkRecord.from_json(text).without_places() for text in texts if b'"duplicates":' not in text]
    sizes = _sizes(output, {"", *(record.table for record in records)})
    there = [record for record in records if record.file is None or sizes.get(record.file.path) == record.file.size]
    parts = Counter(record.chunk for record in there)
    return [record for record in there if parts[record.chunk] == record.parts]


def stored_record(output: str, record: ChunkRecord) -> ChunkRecord:
    """The record as it is stored, with the places of known samples."""
    return ChunkRecord.from_json(read_bytes(join(output, PROGRESS, f"{record.name}.json")))


def _sizes(output: str, tables: Iterable[str]) -> dict[str, int]:
    """Bytes of the files of tables below the output (empty: of the output itself), by their path in it."""
    found = {}
    for table in tables:
        fs, path = filesystem(join(output, table) if table else output)
        with contextlib.suppress(FileNotFoundError):
            for entry in fs.ls(path, detail=True):
                name = entry["name"].rsplit("/", 1)[-1]
                found[f"{table}/{name}" if table else name] = entry["size"]
    return found


def unfinished_shards(num_shards: int, records: Iterable[ChunkRecord]) -> dict[int, dict[int, int]]:
    """Unfinished shards by number, each with its finished chunks: how many samples each took, by number."""
    done: dict[int, dict[int, int]] = {shard: {} for shard in range(num_shards)}
    ends: dict[int, int] = {}
    for record in records:
        there = done[record.shard]
        there[record.number] = there.get(record.number, 0) + record.samples
        if record.last:
            ends[record.shard] = record.number
    return {shard: there for shard, there in done.items() if shard not in ends or len(there) <= ends[shard]}


def drop_duplicates(
    output: str, records: Sequence[ChunkRecord], *, row_group_rows: int = ROW_GROUP_ROWS
) -> list[ChunkRecord]:
    """Keep each sample id once, in the first chunk that has it, and rewrite the parts that lose rows.

    Safe to repeat: an earlier chunk always keeps the sample that is dropped, and a part whose rewriting was interrupted
    no longer matches its record, so its chunk is made again.
    """
    ordered = sorted(records, key=in_order)
    return [
        record if kept.all() else _keep_rows(output, record, kept, row_group_rows)
        for record, kept in zip(ordered, first_of_each([record.sample_ids for record in ordered]), strict=True)
    ]


def first_of_each(names: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """For each list of sample ids, which of them stand in no list before, nor earlier in it; bool [ids]."""
    # Bytes take a quarter of NumPy text's memory; they are as long as the longest id, whatever a system's ids are.
    ids = np.array([name.encode() for some in names for name in some], dtype=np.bytes_)
    is_first = np.zeros(len(ids), dtype=bool)
    is_first[np.unique(ids, return_index=True)[1]] = True
    return np.split(is_first, np.cumsum([len(some) for some in names])[:-1]) if names else []


def _keep_rows(output: str, record: ChunkRecord, kept: np.ndarray, row_group_rows: int) -> ChunkRecord:
    table = pq.read_table(pa.BufferReader(read_bytes(join(output, record.part_name))))
    dropped = table.filter(pa.array(~kept)).select(PLACE_COLUMNS).to_pylist()
    record = replace(record, bad=(*record.bad, *(BadSample(**place, reason=DUPLICATE) for place in dropped)))
    if not kept.any():
        fs, path = filesystem(join(output, record.part_name))
        fs.rm_file(path)
    return write_chunk(output, record, table.filter(pa.array(kept)), row_group_rows=row_group_rows)


def ledger(
    output: str, records: Sequence[ChunkRecord], known_places: Mapping[str, str] | None = None
) -> list[BadSample]:
    """All samples that were left out, in the order of the source; duplicates name the location of the sample that was
    kept.

    In a job that was stopped midway, the chunk of the kept sample may not be finished; its location is then omitted.

    Args:
        known_places: location by id of those that a growing table had before.
    """
    ordered = sorted(records, key=in_order)
    bad = [sample for record in ordered for sample in record.bad]
    wanted = {sample.sample_id for sample in bad if sample.code == DUPLICATE}
    parts = [record.part_name for record in ordered if not wanted.isdisjoint(record.sample_ids)]
    kept = dict(known_places or {})
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for table in pool.map(lambda name: read_places(join(output, name)), parts):
            for row in table.to_pylist():
                if row["sample_id"] in wanted:
                    kept.setdefault(row["sample_id"], row["source_uri"])

    # Whoever was kept within a chunk may itself be the duplicate of an earlier chunk's sample, under another id where a
    # row is named by its stored bytes.
    instead = {sample.source_uri: kept[sample.sample_id] for sample in bad if sample.sample_id in kept}

    def with_place(sample: BadSample) -> BadSample:
        if sample.code != DUPLICATE:
            return sample
        told = sample.reason.partition(": of ")[2]
        place = kept.get(sample.sample_id or "") or instead.get(told, told)
        return replace(sample, reason=f"{DUPLICATE}: of {place}") if place else sample

    return list(map(with_place, bad))


def read_places(part: str, columns: Sequence[str] = PLACE_COLUMNS) -> pa.Table:
    """Columns of a part that tell of its samples, without the rest of it."""
    fs, path = arrow_filesystem(part)
    return retried(f"read {part}", lambda: pq.read_table(path, columns=list(columns), filesystem=fs))


def in_order(record: ChunkRecord) -> tuple[int, int, int]:
    """Sort key: the order of the source."""
    return record.shard, record.number, record.part
