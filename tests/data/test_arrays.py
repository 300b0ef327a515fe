"""Arrays become rows and rows arrays, in shape and value; what does not fit is refused by name."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2f_core.data.arrays import arrays_to_table, table_to_arrays
from d2f_core.data.manifest import write_part
from d2f_core.data.schema import SchemaError, array_field, array_kind, check_schema, sample_id
from tests.data.rows import SHAPE, row_schema, some_rows


def test_arrays_survive_a_table_in_shape_and_value(tmp_path):
    table = some_rows(10)
    file = write_part(str(tmp_path), "a.parquet", table)
    read = pq.ParquetFile(tmp_path / file.path).read_row_group(0, columns=["caption", "mean", "crop"])
    arrays = table_to_arrays(read)
    assert arrays["mean"].shape == (10, *SHAPE) and arrays["mean"].dtype == np.float16
    np.testing.assert_array_equal(arrays["mean"], np.random.default_rng(0).standard_normal((10, *SHAPE)).astype("f2"))
    np.testing.assert_array_equal(arrays["crop"], np.arange(40).reshape(10, 4))
    assert list(arrays["caption"][:2]) == ["caption 0", "caption 1"]


@pytest.mark.parametrize("pieces", [[(3, 4)], [(0, 2), (7, 3)], [(9, 1), (0, 1), (0, 0)], []])
def test_arrays_of_slices_and_chunks_are_the_rows_of_those_slices(pieces):
    table = some_rows(10)
    expected = table_to_arrays(table)["deviation"]
    taken = pa.concat_tables([table.slice(0, 0), *(table.slice(*piece) for piece in pieces)])
    rows = [row for start, count in pieces for row in range(start, start + count)]
    np.testing.assert_array_equal(table_to_arrays(taken, ["deviation"])["deviation"], expected[rows])


def test_arrays_of_another_shape_are_refused():
    columns = table_to_arrays(some_rows(2))
    columns["mean"] = columns["mean"].transpose(0, 2, 1, 3)
    with pytest.raises(SchemaError, match=r"'mean' got arrays of shape \(3, 4, 2\); its rows are \(4, 3, 2\)"):
        arrays_to_table(columns, row_schema())


def test_a_schema_that_does_not_fit_names_the_column():
    table, expected = some_rows(1), row_schema()
    check_schema(table.append_column("more", [[1]]).schema, expected, where="t")
    with pytest.raises(SchemaError, match="t has no column 'caption'"):
        check_schema(table.drop_columns("caption").schema, expected, where="t")
    with pytest.raises(SchemaError, match=r"t: column 'mean' is float16 \(4, 3, 2\), expected .* \(4, 2, 3\)"):
        check_schema(table.schema, row_schema((4, 2, 3)), where="t")
    with pytest.raises(SchemaError, match="t: column 'mean' is fixed_size_binary"):
        check_schema(table.schema, row_schema((4, 2, 2)), where="t")


def test_a_shape_is_read_from_the_field_alone():
    assert array_kind(array_field("x", "float16", (2, 3))) == ((2, 3), np.dtype("float16"))
    with pytest.raises(SchemaError, match="without shape and dtype"):
        array_kind(pa.field("x", pa.binary(12)))
    with pytest.raises(SchemaError, match="holds 12 bytes a row"):
        array_kind(array_field("x", "float16", (2, 3)).with_metadata({"shape": "2,4", "dtype": "float16"}))


def test_a_sample_id_depends_on_image_and_caption():
    assert sample_id(b"image", "caption") == hashlib.sha256(b"image\0caption").hexdigest()[:32]
    assert len({sample_id(b"a", "b"), sample_id(b"a", "c"), sample_id(b"ab", "")}) == 3
