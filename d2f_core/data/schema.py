"""Columns, types and shapes of the tables, and the name of a sample.

A list column of fixed length (a latent, a text state) carries its array shape in its field metadata, for example
`{"shape": "4,16,16"}`, so that a reader needs nothing but the file.
"""

import hashlib
import math
from collections.abc import Sequence

import pyarrow as pa

SCHEMA_VERSION = 1
"""Raised with every change that an older reader would misread."""

ROW_GROUP_ROWS = 64
"""Rows per parquet row group: the smallest piece that a reader can fetch."""

SHAPE_KEY = b"shape"

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


def sample_id(image: bytes, caption: str) -> str:
    """Name of a sample by its content: 32 hex digits, the same wherever and however often it is stored."""
    return hashlib.sha256(image + b"\0" + caption.encode()).hexdigest()[:32]


def array_field(name: str, dtype: pa.DataType, shape: Sequence[int]) -> pa.Field:
    """A column of arrays of one shape, stored flat."""
    if not shape or any(size < 1 for size in shape):
        raise SchemaError(f"Column {name!r} has shape {tuple(shape)}. Every size must be at least 1.")
    text = ",".join(str(size) for size in shape)
    return pa.field(name, pa.list_(dtype, math.prod(shape)), nullable=False, metadata={SHAPE_KEY: text.encode()})


def field_shape(field: pa.Field) -> tuple[int, ...]:
    """The array shape in a column's metadata.

    Raises:
        SchemaError: the column is no array column, or its metadata does not fit its length.
    """
    text = (field.metadata or {}).get(SHAPE_KEY)
    if text is None or not pa.types.is_fixed_size_list(field.type):
        raise SchemaError(f"Column {field.name!r} is {field.type} without a shape. Write it with `array_field`.")
    shape = tuple(int(size) for size in text.decode().split(","))
    if math.prod(shape) != field.type.list_size:
        raise SchemaError(f"Column {field.name!r} says shape {shape} but holds {field.type.list_size} values a row.")
    return shape


def latent_schema(latent_shape: Sequence[int], *, text_shape: Sequence[int] | None = None) -> pa.Schema:
    """Columns of a latent table.

    Args:
        latent_shape: channels, height, width of the (scaled) moments.
        text_shape: tokens and width of stored text states; None when captions are encoded during training.
    """
    text = pa.string()
    fields = [
        pa.field("sample_id", text, nullable=False),
        pa.field("caption", text, nullable=False),
        array_field("latent_mean", pa.float16(), latent_shape),
        array_field("latent_std", pa.float16(), latent_shape),
        # Height x width in pixels of the image that was encoded: samples of one bucket can share a batch.
        pa.field("bucket", text, nullable=False),
        pa.field("source_uri", text, nullable=False),
        # Size of the original image, and the box (left, top, right, bottom) of it that was kept, in its pixels.
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        array_field("crop", pa.int32(), (4,)),
    ]
    if text_shape is not None:
        fields.append(array_field("text_state", pa.float16(), text_shape))
    return pa.schema(fields)


def check_schema(actual: pa.Schema, expected: pa.Schema, *, where: str) -> None:
    """Refuse a table that lacks an expected column or holds it in another type or shape; more columns are fine.

    Raises:
        SchemaError: names the column, what it is, and what it should be.
    """
    for field in expected:
        if field.name not in actual.names:
            raise SchemaError(f"{where} has no column {field.name!r}, only {', '.join(actual.names) or 'none'}.")
        found = actual.field(field.name)
        if found.type != field.type:
            raise SchemaError(f"{where}: column {field.name!r} is {found.type}, expected {field.type}. Write it again.")
        if SHAPE_KEY in (field.metadata or {}) and field_shape(found) != field_shape(field):
            raise SchemaError(f"{where}: column {field.name!r} is {field_shape(found)}, expected {field_shape(field)}.")
