"""Pairs of views show different things of one category, at every angle."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from d2f_core.correspondence.evaluate.view_pairs import angle_between, pairs_of_views, read_views
from d2f_core.data.manifest import read_file, read_manifest
from tests.correspondence.made_views import local_views, write_views


def rows_of(uri: str) -> list[dict[str, Any]]:
    return [
        row for file in read_manifest(uri).files for row in pq.read_table(io.BytesIO(read_file(uri, file))).to_pylist()
    ]


@pytest.mark.parametrize(
    ("first", "second", "apart"), [(0, 30, 30), (350, 10, 20), (0, 180, 180), (10, 200, 170), (720.0, 0.0, 0.0)]
)
def test_an_angle_is_the_shorter_way_around(first: float, second: float, apart: float) -> None:
    assert angle_between(first, second) == angle_between(second, first) == apart


def test_pairs_are_across_things_of_a_category_and_spread_over_angles(tmp_path: Path) -> None:
    views = read_views(write_views(str(tmp_path / "views"), views=8), "val")
    assert {view["split"] for view in views} == {"val"} and len(views) == 32
    pairs = pairs_of_views(views, per_range=3)
    counts = Counter(
        (pair.category, int(np.searchsorted((30, 60, 120), pair.viewpoint, side="right"))) for pair in pairs
    )
    assert set(counts.values()) == {3} and len(counts) == 8
    for pair in pairs:
        assert pair.source is not None and pair.target is not None
        assert pair.source.image_id != pair.target.image_id and pair.source.data is not None
        assert pair.visible.sum() >= 3 and pair.flip.tolist() == [1, 0, -1, -1]
        assert pair.source.size == (48, 48) and len(pair.source.keypoints) == 4
    assert len({pair.pair_id for pair in pairs}) == len(pairs)
    meshes = {view["image_id"]: view["mesh"] for view in views}
    assert all(
        meshes[pair.source.image_id] != meshes[pair.target.image_id] for pair in pairs if pair.source and pair.target
    )


def test_the_seed_alone_draws_the_pairs(tmp_path: Path) -> None:
    views = read_views(local_views(tmp_path / "views"), "val")
    names = [[pair.pair_id for pair in pairs_of_views(views, per_range=2, seed=seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
