"""Outputs with an index: a job meets its own again, whatever types its plan has."""

from pathlib import Path

import pyarrow as pa
import pytest

from d2f_core.batch import output as outputs
from d2f_core.batch.output import IndexedOutput, IndexPart, OutputError, part_name
from d2f_core.data.manifest import Manifest, read_file, read_manifest, write_manifest, write_part

PLAN = {"steps": (2, 4), "sizes": {64: (64, 64)}}


def test_an_identity_with_tuples_is_the_same_when_a_job_is_repeated(tmp_path: Path) -> None:
    uri = str(tmp_path / "made")
    assert IndexedOutput(uri, PLAN, 1).missing == [0]
    output = IndexedOutput(uri, PLAN, 1)
    file = write_part(uri, part_name(0), pa.table({"error": pa.array([None, "dark"], pa.string())}))
    output.add(0, IndexPart(file, 1, {}))
    made = output.finish({}, {"failed": 1})
    assert IndexedOutput(uri, PLAN, 1).manifest == made
    with pytest.raises(OutputError, match=r"steps was \[2, 4\], now \[2, 5\]"):
        IndexedOutput(uri, {**PLAN, "steps": (2, 5)}, 1)


def write_index(uri: str, parts: int, rows: int = 2) -> None:
    values = [list(range(part * rows, (part + 1) * rows)) for part in range(parts)]
    files = [write_part(uri, part_name(part), pa.table({"n": n, "m": n})) for part, n in enumerate(values)]
    write_manifest(uri, Manifest(kind="generations", files=tuple(files)))


def test_an_index_is_read_in_order_and_no_further_than_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_index(str(tmp_path), 40)
    read: list[str] = []
    monkeypatch.setattr(outputs, "read_file", lambda uri, file: read.append(file.path) or read_file(uri, file))
    parts = outputs.stream_index(str(tmp_path), ("n",))
    assert [next(parts).to_pydict() for _ in range(2)] == [{"n": [0, 1]}, {"n": [2, 3]}]
    parts.close()
    assert 2 <= len(read) <= outputs.READ_THREADS + 1
    assert outputs.read_index(str(tmp_path))["n"].to_pylist() == list(range(80))
    largest = max(file.size for file in read_manifest(str(tmp_path)).files)
    monkeypatch.setattr(outputs, "AHEAD_BYTES", 2 * largest)
    read.clear()
    next(outputs.stream_index(str(tmp_path)))
    assert len(read) <= 3, "large parts are not all in memory at once"


def test_a_column_that_came_later_is_null_where_parts_were_written_before(tmp_path: Path) -> None:
    tables = [pa.table({"n": [1]}), pa.table({"n": [2], "later": [3]})]
    files = [write_part(str(tmp_path), part_name(number), table) for number, table in enumerate(tables)]
    write_manifest(str(tmp_path), Manifest(kind="generations", files=tuple(files)))
    assert outputs.read_index(str(tmp_path)).to_pylist() == [{"n": 1, "later": None}, {"n": 2, "later": 3}]


def test_results_come_in_order_and_an_error_in_its_place() -> None:
    assert list(outputs.map_ahead(lambda n: n * n, range(50), 4)) == [n * n for n in range(50)]
    results = outputs.map_ahead(lambda n: 1 // n, [1, 0, 1], 2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
