"""Outputs with an index: a job meets its own again, whatever types its plan has."""

from pathlib import Path

import pyarrow as pa
import pytest

from d2f_core.batch.output import IndexedOutput, IndexPart, OutputError, part_name
from d2f_core.data.manifest import write_part

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
