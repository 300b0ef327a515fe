"""What BMP, GIF, TIFF and AVIF files declare, read before any decoder runs.

As for the other formats, a decoder gets a file without what it does not need: of a TIFF only the first directory's tags
that describe pixels remain, of an AVIF no EXIF.
"""

import struct
from collections.abc import Iterator
from typing import Any

from d2f_core.data.image_headers import MAX_PARTS, BadImageError, Declared

MAX_SUB_BLOCKS = 1_000_000
"""Most data blocks of a GIF, of up to 255 bytes each; a file of 100 MB has 400,000."""
MAX_PAGES = 1000
MAX_TILE = 2**26
"""Largest tile of a TIFF, in values."""
BMP_CORE, BMP_HEADERS, BMP_V5 = 12, (12, 40, 52, 56, 64, 108, 124), 124
GIF_EXTENSION, GIF_IMAGE, GIF_END = 0x21, 0x2C, 0x3B
TIFF_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
"""Bytes per value by a tag's type."""
SUBFILE, WIDTH, HEIGHT, BITS, PHOTOMETRIC, ORIENTATION, SAMPLES = 254, 256, 257, 258, 262, 274, 277
TILE_WIDTH, TILE_HEIGHT, ICC = 322, 323, 34675
# Size, layout, compression and colours; not resolution, text, orientation, profile, EXIF, XMP, layers or thumbnails.
TIFF_PICTURE = {*range(254, 260), 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, *range(322, 326), 332, 338, 339, 347, *range(512, 522), *range(529, 533)}  # fmt: skip  # noqa: E501
WHITE_IS_ZERO, REDUCED = 0, 1
AVIF_BRANDS, AVIF_SEQUENCE = (b"avif", b"avis"), b"avis"


def read_container(data: bytes) -> Declared | None:
    """The header of a BMP, GIF, TIFF or AVIF file; None for anything else.

    Raises:
        BadImageError: the header is cut off or contradicts itself, or there are too many parts.
    """
    try:
        if data.startswith(b"BM"):
            return _bmp(data)
        if data.startswith((b"GIF87a", b"GIF89a")):
            return _gif(data)
        if data[:4] in TIFF_ORDERS:
            return _tiff(data, TIFF_ORDERS[data[:4]])
        if data[4:8] == b"ftyp" and any(brand in AVIF_BRANDS for brand in _brands(data)):
            return _avif(data)
    except (struct.error, IndexError):
        raise BadImageError("undecodable: cut off within its header") from None
    return None


def _brands(data: bytes) -> list[bytes]:
    """The kinds of file that an ISO base media file says it is."""
    (length,) = struct.unpack_from(">I", data)
    return [data[at : at + 4] for at in (8, *range(16, min(length, 256), 4))]


def _bmp(data: bytes) -> Declared:
    (header,) = struct.unpack_from("<I", data, 14)
    if header not in BMP_HEADERS:
        raise BadImageError(f"undecodable: a BMP header of {header} bytes")
    width, height = struct.unpack_from("<HH" if header == BMP_CORE else "<ii", data, 18)
    profile = ()
    if header == BMP_V5 and data[70:74] == b"DEBM":  # an embedded profile
        at, length = struct.unpack_from("<II", data, 14 + 112)
        profile = (memoryview(data)[14 + at : 14 + at + length],)
    if width < 0:
        raise BadImageError(f"undecodable: a width of {width}")
    return Declared(
        format="BMP", width=width, height=abs(height), frames=1, orientation=1, picture=data, profile=profile
    )


def _gif(data: bytes) -> Declared:
    """The screen, and the frames' places on it: Pillow enlarges it to hold the first."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at, frames, blocks = 13 + _colour_table(flags), 0, 0
    while at < len(data) and data[at] != GIF_END:
        if data[at] == GIF_IMAGE:
            left, top, wide, high, flags = struct.unpack_from("<HHHHB", data, at + 1)
            width, height = max(width, left + wide), max(height, top + high)
            at, frames = at + 11 + _colour_table(flags), frames + 1
        elif data[at] == GIF_EXTENSION:
            at += 2
        else:
            raise BadImageError(f"undecodable: a GIF block of kind {data[at]}")
        while at < len(data) and (length := data[at]):
            at, blocks = at + 1 + length, blocks + 1
            if blocks > MAX_SUB_BLOCKS:
                raise BadImageError(f"too_many_parts: more than {MAX_SUB_BLOCKS} blocks")
        at += 1
    return Declared(format="GIF", width=width, height=height, frames=frames, orientation=1, picture=data)


def _colour_table(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _tiff(data: bytes, order: str) -> Declared:
    (first,) = struct.unpack_from(f"{order}I", data, 4)
    tags, then = _directory(data, order, first)
    values = {tag: _number(data, order, entry) for tag, entry in tags.items()}
    width, height = values.get(WIDTH) or 0, values.get(HEIGHT) or 0
    if values.get(TILE_WIDTH, 0) * values.get(TILE_HEIGHT, 0) * values.get(SAMPLES, 1) > MAX_TILE:
        raise BadImageError(f"too_many_pixels: tiles of {values[TILE_WIDTH]}x{values[TILE_HEIGHT]} px")
    _check_levels(values)
    orientation = values.get(ORIENTATION, 1)
    return Declared(
        format="TIFF", width=width, height=height, frames=1 + _further_pages(data, order, first, then),
        orientation=orientation if 1 <= orientation <= 8 else 1,
        picture=_bare_tiff(data, order, first, tags), profile=_tiff_profile(data, order, tags),
    )  # fmt: skip


def _directory(data: bytes, order: str, at: int) -> tuple[dict[int, tuple[int, int, int]], int]:
    """(type, count, place of the entry) of each tag, and the place of the next directory or 0."""
    (count,) = struct.unpack_from(f"{order}H", data, at)
    tags: dict[int, tuple[int, int, int]] = {}
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind, length = struct.unpack_from(f"{order}HHI", data, entry)
        tags.setdefault(tag, (kind, length, entry))
    (then,) = struct.unpack_from(f"{order}I", data, at + 2 + 12 * count)
    return tags, then


def _number(data: bytes, order: str, entry: tuple[int, int, int]) -> int:
    """A tag's first whole number; 0 for other types, and where it lies outside the file."""
    kind, count, at = entry
    form = {1: "B", 3: "H", 4: "I"}.get(kind)
    if form is None or not count:
        return 0
    place = at + 8 if TIFF_SIZES[kind] * count <= 4 else struct.unpack_from(f"{order}I", data, at + 8)[0]
    return struct.unpack_from(order + form, data, place)[0]


def _check_levels(values: dict[int, int]) -> None:
    """Refuse the numbers of bits that Pillow reads as if they were 16, or without turning white and black round."""
    bits = values.get(BITS, 1)
    if bits not in (1, 2, 4, 8, 16, 32) or (bits == 16 and values.get(PHOTOMETRIC) == WHITE_IS_ZERO):
        raise BadImageError(f"mode: {bits} bits per value, or 16 whose 0 is white; save it with 8 or 16 bits")


def _further_pages(data: bytes, order: str, first: int, then: int) -> int:
    """Pages after the first that are pictures of their own, not smaller copies of it."""
    seen, pages = {first}, 0
    while then and then not in seen:
        seen.add(then)
        if len(seen) > MAX_PAGES:
            raise BadImageError(f"too_many_parts: more than {MAX_PAGES} pages")
        tags, then = _directory(data, order, then)
        pages += not (SUBFILE in tags and _number(data, order, tags[SUBFILE]) & REDUCED)
    return pages


def _bare_tiff(data: bytes, order: str, first: int, tags: dict[int, tuple[int, int, int]]) -> bytes:
    """The file with only its first page, and of its tags only those of the picture: the others get a type that does not
    exist, which every reader passes over.
    """
    bare, total = bytearray(data), 0
    (count,) = struct.unpack_from(f"{order}H", data, first)
    for entry in range(first + 2, first + 2 + 12 * count, 12):
        tag, kind, length = struct.unpack_from(f"{order}HHI", data, entry)
        if tag not in TIFF_PICTURE or tags[tag][2] != entry:
            struct.pack_into(f"{order}HI", bare, entry + 2, 0, 0)
            continue
        total += TIFF_SIZES.get(kind, 0) * length
        if length > MAX_PARTS or total > len(data):
            raise BadImageError(f"too_many_parts: {length} values of tag {tag}")
    struct.pack_into(f"{order}I", bare, first + 2 + 12 * count, 0)
    return bytes(bare)


def _tiff_profile(data: bytes, order: str, tags: dict[int, tuple[int, int, int]]) -> tuple[memoryview, ...]:
    if ICC not in tags:
        return ()
    _, length, at = tags[ICC]
    (place,) = struct.unpack_from(f"{order}I", data, at + 8)
    return (memoryview(data)[place : place + length],)


def _avif(data: bytes) -> Declared:
    """Size and colours among the properties of the file's items; Pillow adds the orientation."""
    found: dict[str, Any] = {"sizes": [], "profile": (), "cicp": None}
    picture = data
    for kind, start, end in _boxes(data, 0, len(data)):
        if kind == b"meta":
            _properties(data, start + 4, end, found)
            picture = data[:start] + data[start:end].replace(b"Exif", b"----") + data[end:]
            break
    if not found["sizes"]:
        raise BadImageError("undecodable: an AVIF without a size")
    width, height = max(found["sizes"], key=lambda size: size[0] * size[1])
    return Declared(
        format="AVIF", width=width, height=height, frames=2 if data[8:12] == AVIF_SEQUENCE else 1, orientation=1,
        picture=picture, profile=found["profile"], cicp=None if found["profile"] else found["cicp"],
    )  # fmt: skip


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start of the contents, end) of each box."""
    for _ in range(MAX_PARTS):
        if at + 8 > end:
            return
        length, kind = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start)
            start += 8
        stop = end if length == 0 else min(at + length, end)
        if stop < start:
            raise BadImageError(f"undecodable: a box of {length} bytes")
        yield kind, start, stop
        at = stop
    raise BadImageError(f"too_many_parts: more than {MAX_PARTS} boxes")


def _properties(data: bytes, at: int, end: int, found: dict[str, Any]) -> None:
    """Put the items' sizes and the first colours into `found`."""
    for kind, start, stop in _boxes(data, at, end):
        if kind in (b"iprp", b"ipco"):
            _properties(data, start, stop, found)
        elif kind == b"ispe":
            found["sizes"].append(struct.unpack_from(">II", data, start + 4))
        elif kind == b"colr" and data[start : start + 4] in (b"prof", b"rICC"):
            found["profile"] = found["profile"] or (memoryview(data)[start + 4 : stop],)
        elif kind == b"colr" and data[start : start + 4] == b"nclx" and found["cicp"] is None:
            found["cicp"] = bytes(min(value, 255) for value in struct.unpack_from(">HHHB", data, start + 4))
