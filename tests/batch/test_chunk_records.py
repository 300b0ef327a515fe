"""Records of chunks hold for samples of any system."""

from pathlib import Path

import pyarrow as pa

from d2f_core.batch.chunk_records import ChunkRecord, drop_duplicates, ledger, write_chunk
from d2f_core.storage import read_bytes


def written(output: str, shard: int, names: list[str]) -> ChunkRecord:
    rows = pa.table({"sample_id": names, "source_uri": [f"{shard}/{name}" for name in names]})
    record = ChunkRecord(shard=shard, number=0, last=True, read=len(names), bad=())
    return write_chunk(output, record, rows)


def test_long_ids_that_begin_alike_are_different_samples(tmp_path: Path) -> None:
    output, path = str(tmp_path), "recordings/2026-11-30/camera-left/größe-"
    records = [written(output, 0, [f"{path}1", f"{path}2"]), written(output, 1, [f"{path}2", f"{path}3"])]
    kept = drop_duplicates(output, records)
    assert [record.sample_ids for record in kept] == [(f"{path}1", f"{path}2"), (f"{path}3",)]
    assert [bad.reason for bad in ledger(output, kept)] == [f"duplicate: of 0/{path}2"]
    assert kept[1].file is not None and len(read_bytes(f"{output}/{kept[1].file.path}")) == kept[1].file.size
