"""Several tables below one URI: known by one manifest, held out and read as what they are."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_core.data.manifest import Manifest, TableFile
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.size_tables import held_out_rows, is_by_size, join_tables, kind_of_rows, shared_holdout, tables_of

MADE = {"kind": "latents", "fingerprint": {"autoencoder": "a"}}


def table(*rows: int) -> Manifest:
    files = (TableFile(path=f"{n}", rows=r, size=r, sha256=f"{n}{r}", row_groups=((r, 1),)) for n, r in enumerate(rows))
    return Manifest(files=tuple(files), inputs={"source": "s"}, **MADE)


def test_the_tables_follow_from_the_manifest_of_all():
    tables = [("8x4", table(3, 2)), ("4x4", table(7))]
    joint = join_tables(tables, replace(table(), counts={"read": 13, "written": 12}))
    assert joint.kind == "latents_by_size" and is_by_size(joint) and kind_of_rows(joint) == "latents"
    assert joint.num_rows == 12 and joint.buckets == (("8x4", 5), ("4x4", 7)) and joint.counts["read"] == 13
    assert [file.path for file in joint.files] == ["8x4/0", "8x4/1", "4x4/0"]
    found = tables_of("s3://t", joint)
    assert [uri for uri, _ in found] == ["s3://t/8x4", "s3://t/4x4"]
    assert [each.digest for _, each in found] == [each.digest for _, each in tables]
    assert tables_of("s3://t", tables[0][1]) == [("s3://t", tables[0][1])] and not is_by_size(tables[0][1])


@settings(deadline=None, derandomize=True, max_examples=200)
@given(rows=st.lists(st.integers(1, 40), min_size=1, max_size=8), data=st.data())
def test_held_out_rows_are_shared_in_proportion_and_leave_a_row_of_each(rows, data):
    held = data.draw(st.integers(0, sum(rows) - len(rows)))
    shares = shared_holdout(rows, held)
    assert sum(shares) == held and all(0 <= share < count for share, count in zip(shares, rows, strict=True))
    if all(count > 1 + count * held / sum(rows) for count in rows):
        assert all(abs(share - count * held / sum(rows)) <= 1 for share, count in zip(shares, rows, strict=True))


def test_too_many_held_out_rows_are_refused_with_the_most():
    with pytest.raises(ValueError, match=r"holdout_rows=5 of 7 rows in 3 tables .* Lower it to 4 at most"):
        shared_holdout([4, 2, 1], 5)


def test_held_out_rows_are_numbered_over_all_tables():
    joint = join_tables([("a", table(10)), ("b", table(30))], table())
    assert held_out_rows(joint, 4).tolist() == [0, 10, 20, 30]
    np.testing.assert_array_equal(held_out_rows(table(40), 4), SampleOrder(num_rows=40, holdout_rows=4).holdout())
