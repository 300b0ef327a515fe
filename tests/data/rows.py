"""Small tables of random arrays, for tests of what holds of every table."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from d2f_core.data.arrays import arrays_to_table
from d2f_core.data.schema import array_field

SHAPE = (4, 3, 2)


def row_schema(shape: Sequence[int] = SHAPE) -> pa.Schema:
    text = pa.string()
    return pa.schema(
        [
            pa.field("sample_id", text, nullable=False),
            pa.field("caption", text, nullable=False),
            array_field("mean", "float16", shape),
            array_field("deviation", "float16", shape),
            pa.field("width", pa.int32(), nullable=False),
            array_field("crop", "int32", (4,)),
        ]
    )


def some_rows(rows: int, seed: int = 0) -> pa.Table:
    draw = np.random.default_rng(seed)
    columns = {
        "sample_id": [f"{seed}-{row}" for row in range(rows)],
        "caption": [f"caption {row}" for row in range(rows)],
        "mean": draw.standard_normal((rows, *SHAPE)),
        "deviation": draw.random((rows, *SHAPE)),
        "width": [7] * rows,
        "crop": np.arange(rows * 4).reshape(rows, 4),
    }
    return arrays_to_table(columns, row_schema())
