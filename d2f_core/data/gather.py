"""Rows of several tables, assembled in a given order and serialised per micro-batch."""

import numpy as np
import pyarrow as pa

from d2f_core.data.arrays import array_bytes
from d2f_core.data.schema import is_array

Part = tuple[pa.Table, np.ndarray, np.ndarray]
"""A table, int64 row numbers in it, and their int64 row numbers in the result."""


class Gatherer:
    """Assembles rows in buffers that each call reuses: page faults of new memory would cost as much as the copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], np.ndarray] = {}

    def gather(self, parts: list[Part], rows: int) -> pa.Table:
        """One table with rows of several tables of one schema.

        Array columns are copied once, row by row, into memory that the next call overwrites.

        Args:
            parts: together they fill each of the result's `rows` rows exactly once.
        """
        schema, columns = parts[0][0].schema, []
        source, filled = np.empty(rows, np.int64), 0
        for _, places, target in parts:
            source[target] = np.arange(filled, filled + len(places))
            filled += len(places)
        for field in schema:
            if is_array(field):
                out = self._scratch(field.name, rows, field.type.byte_width)
                for table, places, target in parts:
                    _copy_rows(table.column(field.name), places, out, target)
                columns.append(pa.Array.from_buffers(field.type, rows, [None, pa.py_buffer(out)]))
            else:
                taken = [table.column(field.name).take(pa.array(places)) for table, places, _ in parts]
                chunks = [chunk for column in taken for chunk in column.chunks]
                columns.append(pa.chunked_array(chunks, field.type).take(pa.array(source)).combine_chunks())
        return pa.table(columns, schema=schema)

    def _scratch(self, name: str, rows: int, width: int) -> np.ndarray:
        have = self._buffers.get((name, width))
        if have is None or len(have) < rows:
            have = self._buffers[name, width] = np.empty((rows, width), np.uint8)
        return have[:rows]


def _copy_rows(column: pa.ChunkedArray, places: np.ndarray, out: np.ndarray, target: np.ndarray) -> None:
    """out[target] = column[places] for a column of fixed-size bytes."""
    chunks = [array_bytes(chunk) for chunk in column.chunks]
    starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
    numbers = np.searchsorted(starts, places, side="right") - 1
    inside = places - starts[numbers]
    for to, number, place in zip(target.tolist(), numbers.tolist(), inside.tolist(), strict=True):
        out[to] = chunks[number][place]


def serialised(table: pa.Table, size: int) -> pa.LargeBinaryArray:
    """The table as Arrow IPC streams of `size` rows each."""
    count = -(-table.num_rows // size)
    data = pa.allocate_buffer(table.nbytes + count * (4096 + 1024 * table.num_columns))  # room for the headers
    sink, ends = pa.FixedSizeBufferWriter(data), [0]
    for start in range(0, table.num_rows, size):
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(start, size))
        ends.append(sink.tell())
    return pa.Array.from_buffers(pa.large_binary(), count, [None, pa.py_buffer(np.array(ends, np.int64)), data])
