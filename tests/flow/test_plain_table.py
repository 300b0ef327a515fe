"""Stored features are read as they were written, a few rows at a time and for one number of steps."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from d2f_core.data.manifest import Manifest, write_manifest, write_part
from d2f_core.flow.evaluate import plain_table
from d2f_core.flow.evaluate.feature_table import feature_schema
from d2f_core.flow.evaluate.plain_distances import gather_plain
from d2f_core.flow.evaluate.plain_table import read_plain

FEATURES = np.random.default_rng(0).normal(size=(60, 7)).astype(np.float32)


def write_features(place: Path, *, clip: bool) -> Manifest:
    """Two files of 30 images each, of 2 and 4 steps in turn."""
    files = []
    for start in (0, 30):
        rows = [
            {"row": number, "sample_id": str(number), "steps": 2 + 2 * (number % 2), "features": FEATURES[number],
             "clip_features": FEATURES[number, :3] if clip else None}
            for number in range(start, start + 30)
        ]  # fmt: skip
        files.append(write_part(str(place), f"part-{start}.parquet", pa.Table.from_pylist(rows, feature_schema(7))))
    manifest = Manifest(kind="features", files=tuple(files))
    write_manifest(str(place), manifest)
    return manifest


@pytest.mark.parametrize("clip", [False, True])
def test_a_table_is_read_in_small_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: bool) -> None:
    monkeypatch.setattr(plain_table, "BATCH_ROWS", 8)
    manifest = write_features(tmp_path, clip=clip)
    parts = list(read_plain(str(tmp_path), manifest, 4))
    assert max(len(part.rows) for part in parts) <= 8 and all(part.features.dtype == np.float32 for part in parts)
    np.testing.assert_array_equal(np.concatenate([part.rows for part in parts]), np.arange(1, 60, 2))
    np.testing.assert_array_equal(np.concatenate([part.features for part in parts]), FEATURES[1::2])
    found = gather_plain(parts, total=60, width=7)
    assert found.moments.count == 30
    np.testing.assert_array_equal(found.features, FEATURES[1::2])
    if clip:
        np.testing.assert_array_equal(found.clip_features, FEATURES[1::2, :3])
    else:
        assert found.clip_features is None
    assert list(read_plain(str(tmp_path), manifest, 0)) == []
