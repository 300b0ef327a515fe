"""Numpy arrays <-> rows of a table."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from d2f_core.data.schema import SchemaError, array_kind, is_array


def arrays_to_table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """A table from one array or list per column of the schema; arrays are [rows, *shape of the column].

    Raises:
        SchemaError: an array's shape differs from its column's.
    """
    return pa.table([_to_arrow(columns[field.name], field) for field in schema], schema=schema)


def _to_arrow(values: Any, field: pa.Field) -> pa.Array:
    if not is_array(field):
        return pa.array(values, type=field.type)
    shape, dtype = array_kind(field)
    array = np.ascontiguousarray(values, dtype=dtype)
    if array.shape[1:] != shape:
        raise SchemaError(f"Column {field.name!r} got arrays of shape {array.shape[1:]}; its rows are {shape}.")
    return pa.Array.from_buffers(field.type, len(array), [None, pa.py_buffer(array)])


def table_to_arrays(table: pa.Table, columns: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Columns as numpy arrays: [rows, *shape] for array columns, [rows] of `str` objects or numbers for others.

    Array columns share memory with the table where they can, and are then read-only.
    """
    names = table.column_names if columns is None else list(columns)
    return {name: _to_numpy(table.column(name), table.schema.field(name)) for name in names}


def _to_numpy(column: pa.ChunkedArray, field: pa.Field) -> np.ndarray:
    if not is_array(field):
        return column.to_numpy()
    shape, dtype = array_kind(field)
    chunks = [array_bytes(chunk) for chunk in column.chunks]
    if len(chunks) != 1:  # none or several
        chunks = [np.concatenate([*chunks, np.empty((0, field.type.byte_width), np.uint8)])]
    return chunks[0].view(dtype).reshape(len(column), *shape)


def array_bytes(chunk: pa.FixedSizeBinaryArray) -> np.ndarray:
    """The bytes of an array column's chunk, uint8 [rows, bytes per row], without copying."""
    width = chunk.type.byte_width
    data = np.frombuffer(chunk.buffers()[1] or b"", np.uint8)
    return data[chunk.offset * width : (chunk.offset + len(chunk)) * width].reshape(len(chunk), width)
