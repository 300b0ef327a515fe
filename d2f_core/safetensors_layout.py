"""Where the tensors of a safetensors file lie, for writers that put it together themselves, piece by piece.

`safetensors.save` builds the whole file in one call, with the interpreter's lock held: no other thread runs meanwhile.
What is written by this layout has that call's bytes, which a test compares.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CODES = {
    "bool": ("BOOL", 1), "uint8": ("U8", 1), "int8": ("I8", 1), "int16": ("I16", 2), "uint16": ("U16", 2),
    "float16": ("F16", 2), "bfloat16": ("BF16", 2), "int32": ("I32", 4), "uint32": ("U32", 4), "float32": ("F32", 4),
    "float64": ("F64", 8), "int64": ("I64", 8), "uint64": ("U64", 8),
}  # fmt: skip
"""torch's name of a dtype -> the format's, and bytes per element; the library puts the last ones first in a file, so
that every tensor is aligned."""
ORDER = {name: -number for number, name in enumerate(CODES)}
HEADER_UNIT = 8
"""Bytes of which a header has a multiple."""


@dataclass(frozen=True)
class Layout:
    """A file's beginning, and where the bytes of each tensor are to be put."""

    header: bytes
    starts: dict[str, int]
    """Name -> offset in the file, in the file's order."""
    size: int
    """Bytes of the whole file."""


def layout(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None) -> Layout:
    """The library's layout of a file with these tensors.

    Args:
        tensors: name -> (torch's name of the dtype, such as "float32"; shape).
        metadata: texts to keep in the header.

    Raises:
        ValueError: a dtype that is not in `CODES`.
    """
    if odd := sorted(name for name, (dtype, _) in tensors.items() if dtype not in CODES):
        raise ValueError(f"{odd[0]!r} is of dtype {tensors[odd[0]][0]}. Use one of {', '.join(CODES)}.")
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    ends: dict[str, tuple[int, int]] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (ORDER[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        code, each = CODES[dtype]
        ends[name] = (end, end + each * math.prod(shape))
        end = ends[name][1]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": list(ends[name])}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_UNIT)
    begin = len(text).to_bytes(8, "little") + text
    return Layout(begin, {name: len(begin) + start for name, (start, _) in ends.items()}, len(begin) + end)
