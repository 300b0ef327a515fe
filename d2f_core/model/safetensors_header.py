"""The header of a safetensors file: names, dtypes and shapes of its tensors, read without the tensors.

A file is 8 bytes with the length of the header, the header as JSON, and the tensors' bytes without a gap. So the header
and the file's size tell everything but the values, also whether the file was cut off.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f_core.model import plain_json
from d2f_core.safetensors_layout import CODES

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 8 * 2**20
"""Largest header that is read, enough for 50,000 tensors; the library itself accepts more than ten times as much."""
MAX_DIMENSIONS = 8
DTYPES: Mapping[str, tuple[str, int]] = {
    **{code: (name, size) for name, (code, size) in CODES.items()},
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
}
"""The format's name of a dtype -> torch's, and bytes per element."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a header tells of one tensor."""

    dtype: str
    """torch's name, such as "float32"."""
    shape: tuple[int, ...]


class HeaderError(ValueError):
    """Why a file is refused: the rule and the fix, which follow the file's name in the message."""


def read_begin(read: Callable[[int, int], bytes], size: int) -> bytes:
    """The bytes of a file before its tensors: the header's length and the header.

    Args:
        read: gives the file's bytes from a position up to another.
        size: bytes of the whole file.

    Raises:
        HeaderError: the file is shorter than its header, or the header is too long.
    """
    begin = read(0, min(LENGTH_BYTES, size)) if size else b""
    length = int.from_bytes(begin, "little")
    if size < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise HeaderError(f"has {size:,} bytes and says that {length:,} are its header. Copy the weights again.")
    return begin + (read(LENGTH_BYTES, LENGTH_BYTES + length) if length else b"")


def read_header(file: Path) -> dict[str, TensorHeader]:
    """What the header tells by the tensors' names, after checking that it accounts for every byte of the file.

    Raises:
        HeaderError: the file is no safetensors, or was cut off or damaged in its header.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:

        def read(start: int, end: int) -> bytes:
            handle.seek(start)
            return handle.read(end - start)

        begin = read_begin(read, size)
    try:
        header = plain_json.parse(begin[LENGTH_BYTES:])
    except plain_json.NotPlainError as error:
        raise HeaderError(str(error)) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("has metadata that are not strings by name. Save it again.")
    _check_spans(header, size - len(begin))
    return {name: TensorHeader(DTYPES[entry["dtype"]][0], tuple(entry["shape"])) for name, entry in header.items()}


def _check_spans(header: Mapping[str, Any], size: int) -> None:
    """Raise HeaderError unless the tensors take up the file's `size` bytes one after the other."""
    ends = 0
    for begin, end, name in sorted(_span(name, entry) for name, entry in header.items()):
        if begin != ends:
            raise HeaderError(f"has {name[:60]!r} at byte {begin:,} where {ends:,} is due. Copy the weights again.")
        ends = end
    if ends != size:
        raise HeaderError(f"has {size:,} bytes of tensors; its header tells of {ends:,}. Copy it again.")


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """A tensor's byte range and name, if its dtype, shape and offsets agree."""
    try:
        (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        numbers = [begin, end, *shape]
        plain = len(shape) <= MAX_DIMENSIONS and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        if plain and end - begin == math.prod(shape) * DTYPES[dtype][1]:
            return begin, end, name
    except (KeyError, TypeError, ValueError):
        pass  # refused below, like a tensor whose numbers disagree
    raise HeaderError(
        f"describes the tensor {name[:60]!r} by {str(entry)[:120]}, which does not add up. Copy it again."
    )
