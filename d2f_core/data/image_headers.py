"""What an image file declares, read before any decoder runs, and the file with its metadata removed.

Metadata is where small files grow: a text chunk of 300 KB holds 256 MB, and an EXIF block of 1 MB whose 40,000 entries
all name the same half megabyte is 20 GB to a reader that copies each value. Decoders defend themselves in different
ways and releases, most by refusing the picture too. So only the orientation is read here, and no decoder sees the rest.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from d2f_core.data.errors import BadSampleError

MAX_IMAGE_BYTES = 100 * 2**20
"""Largest image file that is read, in bytes."""
MAX_PARTS = 100_000
"""Most chunks of a PNG or WebP, or segments of a JPEG. A 100 MB file in libpng's 8 KB pieces has 13,000."""
MAX_SCANS = 100
"""Most scans of a progressive JPEG; encoders write about 10. Each costs a pass over the picture, however few its
bytes."""

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
PNG_CHECKSUM = 4
PNG_PICTURE = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# A marker that begins a segment: neither an escaped byte of image data (00), nor fill (FF), TEM or a restart.
JPEG_MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")
FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
COEFFICIENT_BYTES = 2
START, END, SCAN, EXIF_OR_XMP, ICC = 0xD8, 0xD9, 0xDA, 0xE1, 0xE2
ICC_SIGNATURE = b"ICC_PROFILE\0"
# All application segments but JFIF's and Adobe's, which say how the colours are stored; and comments.
JPEG_METADATA = {*range(0xE1, 0xF0), 0xFE} - {0xEE}
ANIMATED_WEBP = b"ANMF"
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
ORIENTATION_TAG, SHORT, LONG = 0x0112, 3, 4


class BadImageError(BadSampleError):
    """An image that is left out; the message, `code: detail`, is the reason in the ledger."""


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What an image file's headers declare; no pixel was decoded."""

    format: str
    """PNG, JPEG, WEBP, BMP, GIF, TIFF or AVIF."""
    width: int
    """`width` and `height` in pixels as stored, before the orientation is applied."""
    height: int
    frames: int
    orientation: int
    """EXIF orientation: 1 is upright, 2 to 8 are rotated or mirrored."""
    picture: bytes
    """The file's bytes without the parts that a decoder does not need."""
    profile: tuple[memoryview, ...] = ()
    """The parts of the embedded colour profile, as they lie in the file: compressed in a PNG, numbered in a JPEG."""
    scans: int = 1
    """Passes over a JPEG's picture."""
    coefficient_bytes: int = 0
    """What a decoder keeps of a JPEG until its last scan has come, at whatever size it is decoded; 0 of one with a
    single scan."""
    cicp: bytes | None = None
    """Primaries, transfer function, matrix and range of ITU-T H.273, a byte each, where the file declares them."""


def too_large(size: int, most: int) -> str:
    """The ledger's reason for a file that is larger than the limit and therefore not read."""
    return f"too_large: {size:,} bytes, at most {most:,} are read"


def read_declared(data: bytes) -> Declared | None:
    """The header of a PNG, JPEG or WebP file; None for anything else.

    Raises:
        BadImageError: the header is cut off or contradicts itself, or there are too many parts.
    """
    try:
        if data.startswith(PNG):
            return _png(data)
        if data.startswith(JPEG):
            return _jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError):
        raise BadImageError("undecodable: cut off within its header") from None
    return None


def _chunks(data: bytes, start: int, header: str, overhead: int, even: int) -> Iterator[tuple[bytes, int, int, int]]:
    """(kind, start, first byte of the contents, end) of each chunk of a PNG or WebP; a truncated chunk ends with the
    file.
    """
    at = start
    for _ in range(MAX_PARTS):
        if at >= len(data):
            return
        first, second = struct.unpack_from(header, data, at)
        length, kind = (first, second) if isinstance(first, int) else (second, first)
        end = at + overhead + length + (length % even)
        yield kind, at, at + 8, min(end, len(data))
        at = end
    raise BadImageError(f"too_many_parts: more than {MAX_PARTS} chunks")


def _png(data: bytes) -> Declared:
    view, kept, size, frames, orientation = memoryview(data), [memoryview(PNG)], None, 1, None
    profile, cicp = (), None
    for kind, start, contents, end in _chunks(data, len(PNG), ">I4s", 12, 1):
        if size is None:
            if kind != b"IHDR":
                raise BadImageError("undecodable: a PNG that does not begin with IHDR")
            size = struct.unpack_from(">II", data, contents)
        elif kind == b"IHDR":
            raise BadImageError("undecodable: two headers (IHDR)")
        if kind in PNG_PICTURE:
            kept.append(view[start:end])
        elif kind == b"acTL":
            (frames,) = struct.unpack_from(">I", data, contents)
        elif kind == b"iCCP":
            profile = profile or (view[contents : end - PNG_CHECKSUM],)
        elif kind == b"cICP":
            cicp = cicp or data[contents : contents + 4]
        elif kind == b"eXIf":
            orientation = orientation or _exif_orientation(data, contents, end)
        elif kind == b"iTXt" and data.startswith(b"XML:com.adobe.xmp\0", contents):
            orientation = orientation or _xmp_orientation(data, contents, end)
        if kind == b"IEND":
            break
    if size is None:
        raise BadImageError("undecodable: a PNG without chunks")
    return Declared(
        format="PNG", width=size[0], height=size[1], frames=frames, orientation=orientation or 1,
        picture=b"".join(kept), profile=profile, cicp=cicp,
    )  # fmt: skip


def _jpeg(data: bytes) -> Declared:
    view, kept, size, orientation, profile = memoryview(data), [], None, None, []
    at, taken, parts, scans, samples, progressive = 2, 0, 0, 0, 0.0, False
    while found := JPEG_MARKER.search(data, at):
        code, at = found[1][0], found.end()
        parts += 1
        if parts > MAX_PARTS:
            raise BadImageError(f"too_many_parts: more than {MAX_PARTS} segments")
        if code == END:
            break
        if code == START:
            continue
        (length,) = struct.unpack_from(">H", data, at)
        if length < 2:
            raise BadImageError(f"undecodable: a segment of {length} bytes")
        end = at + length
        if code in FRAME:
            if size is not None:
                raise BadImageError("undecodable: two frame headers")
            size = struct.unpack_from(">HH", data, at + 3)
            samples, progressive = _samples_per_pixel(data, at), code in PROGRESSIVE
        elif code == SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise BadImageError(f"too_many_scans: more than {MAX_SCANS}")
        elif code == EXIF_OR_XMP:
            exif = data.startswith(b"Exif\0\0", at + 2)
            orientation = orientation or (_exif_orientation if exif else _xmp_orientation)(data, at + 2, end)
        elif code == ICC and data.startswith(ICC_SIGNATURE, at + 2):
            profile.append(view[at + 2 + len(ICC_SIGNATURE) : end])
        if code in JPEG_METADATA:
            kept.append(view[taken : found.start()])
            taken = end
        at = end
    else:
        at = len(data)  # no end marker: the decoder decides
    if size is None:
        raise BadImageError("undecodable: no frame header")
    kept.append(view[taken:at])
    whole = progressive or scans > 1
    return Declared(
        format="JPEG", width=size[1], height=size[0], frames=1, orientation=orientation or 1,
        picture=b"".join(kept), profile=tuple(profile), scans=max(1, scans),
        coefficient_bytes=int(whole * COEFFICIENT_BYTES * size[0] * size[1] * samples),
    )  # fmt: skip


def _samples_per_pixel(data: bytes, at: int) -> float:
    """Samples of all components per pixel, by a frame header's sampling factors: 3, or 1.5 with colours at half width
    and height.
    """
    factors = [divmod(data[at + 9 + 3 * number], 16) for number in range(data[at + 7])]
    most = max((across for across, _ in factors), default=0) * max((down for _, down in factors), default=0)
    return sum(across * down for across, down in factors) / most if most else len(factors)


def _webp(data: bytes) -> Declared:
    size, frames, orientation, profile = None, 0, None, ()
    for kind, _, contents, end in _chunks(data, 12, "<4sI", 8, 2):
        if size is None:
            size = _webp_size(data, kind, contents)
        if kind == ANIMATED_WEBP:
            frames += 1
        elif kind == b"ICCP":
            (length,) = struct.unpack_from("<I", data, contents - 4)
            profile = profile or (memoryview(data)[contents : contents + length],)
        elif kind == b"EXIF":
            orientation = orientation or _exif_orientation(data, contents, end)
        elif kind == b"XMP ":
            orientation = orientation or _xmp_orientation(data, contents, end)
    if size is None:
        raise BadImageError("undecodable: a WebP without chunks")
    return Declared(
        format="WEBP", width=size[0], height=size[1], frames=frames or 1, orientation=orientation or 1,
        picture=data, profile=profile,
    )  # fmt: skip


def _webp_size(data: bytes, kind: bytes, at: int) -> tuple[int, int]:
    """Width and height declared by the first chunk: the canvas, or the only picture."""
    if kind == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, at + 4)
        return (high_w << 16 | low_w) + 1, (high_h << 16 | low_h) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, at + 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, at + 1)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise BadImageError(f"undecodable: a WebP that begins with {kind!r}")


def _exif_orientation(data: bytes, start: int, end: int) -> int | None:
    """The orientation in the first directory of an EXIF block; None when it is missing or invalid."""
    block = data[start:end]
    while block.startswith(b"Exif\0\0"):
        block = block[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", block, entry)
            if tag == ORIENTATION_TAG and kind in (SHORT, LONG):
                (value,) = struct.unpack_from(order + ("H" if kind == SHORT else "I"), block, entry + 8)
                return value if 1 <= value <= 8 else None
    except struct.error:
        return None
    return None


def _xmp_orientation(data: bytes, start: int, end: int) -> int | None:
    found = XMP_ORIENTATION.search(data, start, end)
    return int(found[1]) if found else None
