"""What a driver holds of a large index, by the kernel's own count of processes that do nothing else."""

from pathlib import Path

import pytest

from benchmarks.index_memory import Config, in_a_fresh_process, write_errors, write_index


def peak(folder: Path, rows: int) -> float:
    """MB of a depth evaluation's driver: all maps of the index found, all metrics estimated."""
    config = Config(rows=rows, rows_per_part=50_000, replicates=1)
    folder.mkdir()
    write_index(folder, config)
    write_errors(folder, config)
    measured = in_a_fresh_process("depth", folder, config)
    assert measured["done"] == rows
    return float(str(measured["peak_mb"]))


@pytest.mark.starts_processes
def test_a_depth_evaluations_driver_holds_less_than_200_bytes_for_each_row_of_an_index(tmp_path: Path) -> None:
    """As Python dicts a row took 1,400."""
    few, many = peak(tmp_path / "few", 100_000), peak(tmp_path / "many", 1_000_000)
    assert (many - few) * 1e6 / 900_000 < 200
