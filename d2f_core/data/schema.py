"""Columns, types and shapes of the tables, and the id of a sample.

An array column (a latent, a text state) holds each row's numbers as bytes of one length, with shape and dtype in its
field metadata, for example `{"shape": "4,16,16", "dtype": "float16"}`, so that a reader needs nothing but the file.
Bytes, not lists of numbers: parquet would decode each number, which takes 5 to 20 times as long as copying them.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 3
"""Incremented with every change that an older reader would misread. Version 2 manifests list the rows of every row
group, version 3 run-length encodes them; the tables are the same."""

NEWER_PROPERTIES = {"captions": 4}
"""Property in a manifest's fingerprint that an older reader would pass over -> version with which it is written."""

READABLE_VERSIONS = (2, 3, 4)

ROW_GROUP_ROWS = 64
"""Rows per parquet row group (the smallest piece that a reader can fetch) in a table with small rows."""

SHAPE_KEY, DTYPE_KEY = b"shape", b"dtype"

IMAGE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("source_uri", pa.string(), nullable=False),
    ]
)
"""One row per captioned image; `image` holds the bytes of a PNG, JPEG or WebP file."""


class SchemaError(ValueError):
    """A table whose columns, shapes or encoder are not the expected ones."""


def written_version(fingerprint: Mapping[str, Any]) -> int:
    """Schema version of the manifest of a table with these properties."""
    return max([SCHEMA_VERSION, *(NEWER_PROPERTIES.get(name, 0) for name in fingerprint)])


def sample_id(image: bytes, caption: str) -> str:
    """Content hash of a sample, 32 hex digits: equal content has the same id in every table."""
    return hashlib.sha256(image + b"\0" + caption.encode()).hexdigest()[:32]


def array_field(name: str, dtype: str, shape: Sequence[int]) -> pa.Field:
    """A column of arrays of one shape and numpy dtype."""
    if not shape or any(size < 1 for size in shape):
        raise SchemaError(f"Column {name!r} has shape {tuple(shape)}. Every size must be at least 1.")
    metadata = {SHAPE_KEY: ",".join(str(size) for size in shape).encode(), DTYPE_KEY: np.dtype(dtype).name.encode()}
    width = math.prod(shape) * np.dtype(dtype).itemsize
    return pa.field(name, pa.binary(width), nullable=False, metadata=metadata)


def is_array(field: pa.Field) -> bool:
    return SHAPE_KEY in (field.metadata or {})


def array_kind(field: pa.Field) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and dtype in an array column's metadata.

    Raises:
        SchemaError: the column is no array column, or its metadata contradict its byte length.
    """
    metadata = field.metadata or {}
    if not {SHAPE_KEY, DTYPE_KEY} <= metadata.keys() or not pa.types.is_fixed_size_binary(field.type):
        raise SchemaError(
            f"Column {field.name!r} is {field.type} without shape and dtype. Write it with `array_field`."
        )
    shape = tuple(int(size) for size in metadata[SHAPE_KEY].decode().split(","))
    dtype = np.dtype(metadata[DTYPE_KEY].decode())
    if math.prod(shape) * dtype.itemsize != field.type.byte_width:
        raise SchemaError(
            f"Column {field.name!r} says {dtype} of shape {shape} but holds {field.type.byte_width} bytes a row."
        )
    return shape, dtype


def check_schema(actual: pa.Schema, expected: pa.Schema, *, where: str) -> None:
    """Refuse a table that lacks an expected column or has it with another type or shape; additional columns are fine.

    Raises:
        SchemaError: names the column, its type, and the expected type.
    """
    for field in expected:
        if field.name not in actual.names:
            raise SchemaError(f"{where} has no column {field.name!r}, only {', '.join(actual.names) or 'none'}.")
        found = actual.field(field.name)
        if found.type != field.type:
            raise SchemaError(f"{where}: column {field.name!r} is {found.type}, expected {field.type}. Write it again.")
        if is_array(field) and array_kind(found) != array_kind(field):
            (shape, dtype), (wanted, kind) = array_kind(found), array_kind(field)
            raise SchemaError(f"{where}: column {field.name!r} is {dtype} {shape}, expected {kind} {wanted}.")
