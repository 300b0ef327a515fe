"""What an unfinished encode job has done, kept beside its parts; and how the parts become a table.

    OUTPUT/part-SSSSSS-NNNNN.parquet          chunk N of shard S, written first, whole
    OUTPUT/_progress/SSSSSS-NNNNN.json        its record, written second: the chunk is done
    OUTPUT/_progress/job.json                 what the job is; another job is refused
    OUTPUT/quarantine.parquet, manifest.json  written at the end; then _progress is removed

A record counts only while its part is there with the size that it says.
"""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.manifest import TableFile, write_part
from d2f_core.data.quarantine import BadSample
from d2f_core.storage import filesystem, join, list_names, read_bytes, write_bytes

PROGRESS = "_progress"
JOB_NAME = "job.json"
READ_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class ChunkRecord:
    """One chunk: up to `rows_per_part` consecutive samples of one shard."""

    shard: int
    number: int
    """Within the shard."""
    last: bool
    """Whether it ends its shard."""
    read: int
    bad: tuple[BadSample, ...]
    duplicates: int
    sample_ids: tuple[str, ...] = ()
    """Of the rows of its part."""
    file: TableFile | None = None
    """None when the chunk has no good sample."""

    @property
    def name(self) -> str:
        return f"{self.shard:06d}-{self.number:05d}"

    @property
    def part_name(self) -> str:
        return f"part-{self.name}.parquet"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "ChunkRecord":
        content = json.loads(text)
        file = content.pop("file")
        content["file"] = TableFile(**{**file, "row_groups": tuple(file["row_groups"])}) if file else None
        content["bad"] = tuple(BadSample(**bad) for bad in content["bad"])
        return cls(**{**content, "sample_ids": tuple(content["sample_ids"])})


def write_chunk(output: str, record: ChunkRecord, table: pa.Table) -> ChunkRecord:
    """Write a chunk's part, then its record; a chunk without rows has no part."""
    file = write_part(output, record.part_name, table) if table.num_rows else None
    record = replace(record, file=file, sample_ids=tuple(table.column("sample_id").to_pylist()))
    write_bytes(join(output, PROGRESS, f"{record.name}.json"), record.to_json().encode())
    return record


def read_records(output: str) -> list[ChunkRecord]:
    """The chunks that are done: those with a record whose part is there in full."""
    names = [name for name in list_names(join(output, PROGRESS)) if name.endswith(".json") and name != JOB_NAME]
    sizes = _sizes(output)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        texts = pool.map(lambda name: read_bytes(join(output, PROGRESS, name)), names)
        records = [ChunkRecord.from_json(text) for text in texts]
    return [record for record in records if record.file is None or sizes.get(record.file.path) == record.file.size]


def _sizes(output: str) -> dict[str, int]:
    """Bytes of the files directly under a URI, by name."""
    fs, path = filesystem(output)
    try:
        entries = fs.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in entries}


def unfinished_shards(num_shards: int, records: Iterable[ChunkRecord]) -> dict[int, frozenset[int]]:
    """The shards with work left, and the numbers of their chunks that are done."""
    numbers: dict[int, set[int]] = {}
    ends: dict[int, int] = {}
    for record in records:
        numbers.setdefault(record.shard, set()).add(record.number)
        if record.last:
            ends[record.shard] = record.number
    done = {shard: frozenset(numbers.get(shard, ())) for shard in range(num_shards)}
    return {shard: there for shard, there in done.items() if shard not in ends or len(there) <= ends[shard]}


def drop_duplicates(output: str, records: Sequence[ChunkRecord]) -> list[ChunkRecord]:
    """Keep each sample id once, in its first chunk, and rewrite the parts that lose rows.

    Safe to repeat: what is dropped is always kept by an earlier chunk, and a part whose rewriting was interrupted no
    longer fits its record, so its chunk is encoded again.
    """
    ordered = sorted(records, key=lambda record: (record.shard, record.number))
    ids = np.array([sample for record in ordered for sample in record.sample_ids], dtype="S32")
    keep = np.zeros(len(ids), dtype=bool)
    keep[np.unique(ids, return_index=True)[1]] = True
    result, first = [], 0
    for record in ordered:
        kept = keep[first : first + len(record.sample_ids)]
        first += len(kept)
        result.append(record if kept.all() else _keep_rows(output, record, kept))
    return result


def _keep_rows(output: str, record: ChunkRecord, kept: np.ndarray) -> ChunkRecord:
    table = pq.read_table(pa.BufferReader(read_bytes(join(output, record.part_name))))
    record = replace(record, duplicates=record.duplicates + int((~kept).sum()))
    if not kept.any():
        fs, path = filesystem(join(output, record.part_name))
        fs.rm_file(path)
    return write_chunk(output, record, table.filter(pa.array(kept)))
