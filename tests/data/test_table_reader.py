"""Damaged rows are found, named with file, row and reason, and the others come through whole."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2f_core import storage
from d2f_core.data.arrays import arrays_to_table, table_to_arrays
from d2f_core.data.manifest import Manifest, TableFile, read_manifest, write_manifest, write_part
from d2f_core.data.plan_reader import PlanReader
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.schema import array_field
from d2f_core.data.stream_plan import BUFFER_BYTES, Source, StreamPlan
from d2f_core.data.table_reader import DamagedDataError, RowReader, TableReader

FILES, ROWS, GROUP = 4, 256, 64
COLUMNS = ("caption", "latent")


def rows_of(file: int, shape=(2, 3)) -> pa.Table:
    numbers = np.arange(file * ROWS, (file + 1) * ROWS)
    values = np.random.default_rng(file).normal(size=(ROWS, *shape))
    schema = pa.schema([pa.field("caption", pa.string()), array_field("latent", "float16", shape)])
    return arrays_to_table({"caption": [f"row {n}" for n in numbers], "latent": values}, schema)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    files = tuple(write_part(str(tmp_path), f"part-{i}.parquet", rows_of(i)) for i in range(FILES))
    write_manifest(str(tmp_path), Manifest(kind="images", files=files))
    return tmp_path


def read_all(table: Path):
    return TableReader(str(table), read_manifest(str(table)), COLUMNS).read(0, FILES * ROWS)


def assert_lost(table: Path, lost: range | set[int], reason: str) -> None:
    """Exactly these rows are unusable, each with the reason; all others have their own content."""
    found = read_all(table)
    assert set(found.reasons) == set(lost)
    assert all(reason in text for text in found.reasons.values())
    captions = found.table.column("caption").to_pylist()
    for row in set(range(FILES * ROWS)) - set(lost):
        assert captions[found.places[row]] == f"row {row}"
    assert all(found.places[row] == -1 for row in lost)


def overwrite(file: Path, change) -> None:
    data = bytearray(file.read_bytes())
    file.write_bytes(bytes(change(data)))


def test_a_whole_table_comes_whole(table):
    assert_lost(table, set(), "")


def test_a_flipped_bit_costs_the_row_group_that_it_lies_in(table):
    metadata = pq.read_metadata(table / "part-1.parquet").row_group(2).column(1)

    def flip(data: bytearray) -> bytearray:
        data[metadata.data_page_offset + 100] ^= 4
        return data

    overwrite(table / "part-1.parquet", flip)
    assert_lost(table, range(ROWS + 2 * GROUP, ROWS + 3 * GROUP), "part-1.parquet")


@pytest.mark.parametrize("seed", range(40))
def test_no_flipped_bit_anywhere_gives_other_numbers_unnoticed(table, seed):
    """Wherever the bit lies, a row is as it was, or it is named."""
    whole = read_all(table)
    file = table / "part-2.parquet"
    generator = np.random.default_rng(seed)

    def flip(data: bytearray) -> bytearray:
        data[int(generator.integers(4, len(data)))] ^= 1 << int(generator.integers(8))
        return data

    overwrite(file, flip)
    found = read_all(table)
    for row in set(range(FILES * ROWS)) - set(found.reasons):
        assert found.table.slice(int(found.places[row]), 1).equals(whole.table.slice(row, 1)), row
    assert set(found.reasons) <= set(range(2 * ROWS, 3 * ROWS))


def test_a_truncated_object_is_not_completed_from_memory(s3):
    """Arrow, told a size that is too large, finds the end of the file read before where S3 sends nothing."""
    del s3
    uri = "s3://d2f/test-table-reader/truncated"
    files = tuple(write_part(uri, f"part-{i}.parquet", rows_of(0, (4, 8, 8))) for i in range(FILES))
    assert len({file.size for file in files}) == 1, "so all have their footers in the same place"
    write_manifest(uri, Manifest(kind="images", files=files))
    reader = TableReader(uri, read_manifest(uri), COLUMNS)
    assert not reader.read(0, FILES * ROWS).reasons
    place = f"{uri}/part-1.parquet"
    data = storage.read_bytes(place)
    storage.write_bytes(place, data[: len(data) // 2])
    for _ in range(20):
        found = TableReader(uri, read_manifest(uri), COLUMNS).read(0, FILES * ROWS)
        assert set(found.reasons) == set(range(ROWS, 2 * ROWS))
        reason = f"unreadable: part-1.parquet: it has {len(data) // 2} bytes, its manifest says {len(data)}"
        assert set(found.reasons.values()) == {reason}


def test_a_truncated_file_costs_its_rows(table):
    overwrite(table / "part-3.parquet", lambda data: data[: len(data) // 2])
    assert_lost(table, range(3 * ROWS, 4 * ROWS), "part-3.parquet")


def test_a_missing_file_costs_its_rows(table):
    (table / "part-0.parquet").unlink()
    assert_lost(table, range(ROWS), "part-0.parquet")


def replace(table: Path, number: int, rows: pa.Table) -> None:
    """Put another file in a part's place, with a manifest that knows it."""
    files = list(read_manifest(str(table)).files)
    files[number] = write_part(str(table), files[number].path, rows)
    (table / "manifest.json").unlink()
    write_manifest(str(table), Manifest(kind="images", files=tuple(files)))


def test_numbers_that_are_not_finite_cost_their_rows_only(table):
    rows = rows_of(1)
    arrays = table_to_arrays(rows)
    arrays["latent"] = arrays["latent"].copy()
    arrays["latent"][7, 1, 0], arrays["latent"][200, 0, 0] = np.nan, np.inf
    replace(table, 1, arrays_to_table(arrays, rows.schema))
    assert_lost(table, {ROWS + 7, ROWS + 200}, "not_finite")


def test_a_file_of_another_shape_costs_its_rows(table):
    replace(table, 2, rows_of(2, shape=(3, 2)))
    assert_lost(table, range(2 * ROWS, 3 * ROWS), "wrong_shape: part-2.parquet holds")


def test_a_file_without_a_column_costs_its_rows(table):
    replace(table, 2, rows_of(2).drop_columns(["latent"]))
    assert_lost(table, range(2 * ROWS, 3 * ROWS), "wrong_shape")


def test_any_rows_in_any_order(table):
    reader = RowReader(str(table), read_manifest(str(table)), ["caption"])
    wanted = np.array([1023, 0, 64, 255, 256, 63, 0])
    assert reader.read(wanted).column("caption").to_pylist() == [f"row {i}" for i in wanted]
    assert reader.read(wanted).column_names == ["caption"]
    overwrite(table / "part-0.parquet", lambda data: data[:1000])
    with pytest.raises(DamagedDataError, match=r"row 63: unreadable: part-0\.parquet"):
        reader = RowReader(str(table), read_manifest(str(table)), ["caption"])
        reader.read(np.array([300, 63]))


BUFFERS = {"whole windows": BUFFER_BYTES, "row groups": 2**14}


def micro_batches_of(table: Path, steps: int = 16, *, batch: int = 64, buffer: int = BUFFER_BYTES) -> list[pa.Table]:
    order = SampleOrder(num_rows=FILES * ROWS, batch=batch, window_rows=128, lanes=4)
    plan = StreamPlan(
        sources=(Source(uri=str(table), order=order),), columns=COLUMNS, global_batch_size=batch,
        micro_batch_size=batch, num_steps=steps, buffer_bytes=buffer,
    )  # fmt: skip
    chunks = PlanReader(plan, rank=0, num_workers=1, first_step=0)
    return [pa.ipc.open_stream(part.as_buffer()).read_all() for chunk in chunks for part in chunk.column("micro_batch")]


@pytest.mark.parametrize("buffer", BUFFERS.values(), ids=BUFFERS)
def test_an_epoch_is_the_used_rows_plus_the_quarantined_ones(table, buffer):
    overwrite(table / "part-3.parquet", lambda data: data[: len(data) // 2])
    batches = pa.concat_tables(micro_batches_of(table, buffer=buffer))
    assert sorted(batches.column("row").to_pylist()) == list(range(FILES * ROWS))
    used, lost = 0, []
    for row, caption, reason in zip(
        *(batches.column(name).to_pylist() for name in ("row", "caption", "reason")), strict=True
    ):
        if reason is None:
            assert caption == f"row {row}"
            used += 1
        else:
            assert "part-3.parquet" in reason
            lost.append(row)
    assert used + len(lost) == FILES * ROWS and sorted(lost) == list(range(3 * ROWS, 4 * ROWS))


def test_a_micro_batch_without_one_usable_row_is_filled_from_elsewhere(table):
    """Fetched by row groups, a row at a time, nothing else is at hand."""
    overwrite(table / "part-0.parquet", lambda data: data[:200])
    batches = micro_batches_of(table, FILES * ROWS, batch=1, buffer=1)
    lost = [batch.column("row")[0].as_py() for batch in batches if batch.column("reason").null_count == 0]
    assert sorted(lost) == list(range(ROWS))
    fillers = {batch.column("caption")[0].as_py() for batch in batches if batch.column("row")[0].as_py() in lost}
    assert fillers == {f"row {ROWS}"}


def test_a_table_without_one_usable_row_is_refused(table):
    for number in range(FILES):
        overwrite(table / f"part-{number}.parquet", lambda data: data[:200])
    with pytest.raises(DamagedDataError, match="No file of"):
        micro_batches_of(table)


def test_files_that_hold_other_rows_than_the_manifest_says_are_named(table):
    manifest = read_manifest(str(table))
    shorter = write_part(str(table), "part-1.parquet", rows_of(1).slice(0, 200))
    files = list(manifest.files)
    files[1] = TableFile(path="part-1.parquet", rows=ROWS, size=shorter.size, sha256="", row_groups=((64, 4),))
    (table / "manifest.json").unlink()
    write_manifest(str(table), Manifest(kind="images", files=tuple(files)))
    lost = range(ROWS + 192, 2 * ROWS)
    found = read_all(table)
    assert set(found.reasons) == set(lost) and found.places[ROWS + 191] >= 0
