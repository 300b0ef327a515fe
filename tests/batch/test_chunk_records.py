"""Records of chunks hold for samples of any system."""

from pathlib import Path

import pyarrow as pa

from d2f_core.batch.chunk_records import ChunkRecord, drop_duplicates, ledger, read_records, write_chunk
from d2f_core.batch.chunks import pack, write_row
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


def test_parts_have_the_row_groups_that_the_spec_asks_for_with_and_without_duplicates(tmp_path: Path) -> None:
    output, names = str(tmp_path), ["a", "b", "c", "d", "e"]
    for shard in range(2):
        rows = pa.table({"sample_id": [*names[shard:], f"{shard}"], "source_uri": [""] * (6 - shard)})
        record = ChunkRecord(shard=shard, number=0, last=True, read=rows.num_rows, bad=())
        write_row(pack(record, rows), output=output, row_group_rows=2)
    first, second = drop_duplicates(output, read_records(output), row_group_rows=2)
    assert first.file is not None and first.file.row_groups == ((2, 3),)
    assert second.file is not None and second.file.row_groups == ((1, 1),)
    once_more = drop_duplicates(output, [first, second], row_group_rows=2)
    assert once_more == [first, second]
