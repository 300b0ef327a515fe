"""Image files that were made to hurt, built in code; each is a few hundred bytes to a few megabytes."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from tests.data.pictures import file_bytes, pixels
from tests.data.profiles import DISPLAY_P3, matrix_profile

PICTURE = pixels(0, 20, 24)
"""What a file shows that is harmless once everything around its picture is passed over."""


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def png_with(*extra: bytes, picture: np.ndarray = PICTURE) -> bytes:
    """A good PNG with more chunks behind its header."""
    good = file_bytes(picture)
    return good[:33] + b"".join(extra) + good[33:]


def profiled(profile: bytes) -> bytes:
    """A good PNG with a colour profile."""
    return png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(profile)))


def many_tags() -> bytes:
    """A profile whose table declares 2^24 tags, all of them the same."""
    good = matrix_profile(DISPLAY_P3)
    return good[:128] + struct.pack(">I", 2**24) + good[132:144] * 100_000


def segment(code: int, data: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(data) + 2) + data


def jpeg_with(*extra: bytes) -> bytes:
    """A good JPEG with more segments behind its first two bytes."""
    good = file_bytes(PICTURE, "JPEG")
    return good[:2] + b"".join(extra) + good[2:]


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def exif_bomb(size: int) -> bytes:
    """EXIF whose entries, half of the block, all name the other half: unpacked it grows by the size's square / 48."""
    count = min(size // 24, 65_535)
    entries = b"".join(struct.pack("<HHII", tag, 7, size // 2, size // 2) for tag in range(1, count + 1))
    block = b"II*\0" + struct.pack("<IH", 8, count) + entries
    return block.ljust(size, b"\0")


def many_scans(count: int) -> bytes:
    """A progressive JPEG of 3000 x 3000 pixels that goes over all of them again and again, in 10 bytes a time."""
    sink = io.BytesIO()
    Image.new("L", (3000, 3000)).save(sink, "JPEG", progressive=True)
    good = sink.getvalue()
    last = good.rindex(b"\xff\xda")
    return good[:-2] + good[last:-2] * count + good[-2:]


def one_bit(side: int) -> bytes:
    sink = io.BytesIO()
    Image.new("1", (side, side)).save(sink, "PNG", compress_level=9)
    return sink.getvalue()


def frames(kind: str) -> bytes:
    sink = io.BytesIO()
    shots = [Image.fromarray(pixels(number)) for number in range(3)]
    shots[0].save(sink, kind, save_all=True, append_images=shots[1:])
    return sink.getvalue()


def other(kind: str) -> bytes:
    return file_bytes(PICTURE, kind)


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def zip_bytes() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("run.sh", "rm -rf ~")
    return sink.getvalue()


def vp8x(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    return b"VP8X", bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


def webp_body() -> bytes:
    return file_bytes(PICTURE, "WEBP")[20:]


def resized_frame(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header declares another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def twice_framed() -> bytes:
    data = file_bytes(PICTURE, "JPEG")
    at = data.index(b"\xff\xc0")
    frame = data[at : at + 19]
    return data[:at] + resized_frame(frame, 65_500, 65_500) + data[at:]


def big(text: bytes) -> bytes:
    return zlib.compress(text * (256 * 2**20 // len(text)), 9)


def with_frame_code(code: int) -> bytes:
    return file_bytes(PICTURE, "JPEG").replace(b"\xff\xc0", bytes([0xFF, code]), 1)


def resized_gif(width: int, height: int) -> bytes:
    data = bytearray(other("GIF"))
    struct.pack_into("<HH", data, 6, width, height)
    return bytes(data)


def resized_bmp(width: int, height: int) -> bytes:
    data = bytearray(other("BMP"))
    struct.pack_into("<ii", data, 18, width, height)
    return bytes(data)


def tiff(values: Mapping[int, int], counts: Mapping[int, int] | None = None) -> bytes:
    """A good TIFF with tags of other values, or added to its end."""
    good = {256: 24, 257: 20, 258: 8, 259: 1, 262: 1, 273: 400, 277: 1, 278: 20, 279: 480} | dict(values)
    entries = [struct.pack("<HHII", tag, 4, (counts or {}).get(tag, 1), value) for tag, value in sorted(good.items())]
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return head.ljust(400, b"\0") + bytes(480)


def tiff_with_exif() -> bytes:
    """The picture as a TIFF whose EXIF and XMP are 20 GB to a reader that copies each value."""
    sink = io.BytesIO()
    Image.fromarray(PICTURE).save(sink, "TIFF", tiffinfo={700: exif_bomb(2**20), 34377: exif_bomb(2**20)})
    return sink.getvalue()


def endless_pages() -> bytes:
    data = bytearray(tiff({}))
    count, first = 9, len(data)
    struct.pack_into("<I", data, 10 + 12 * count, first)
    for page in range(1, 3000):
        data += struct.pack("<HI", 0, first + 6 * page)
    return bytes(data)


def resized_avif(width: int, height: int) -> bytes:
    data = bytearray(other("AVIF"))
    struct.pack_into(">II", data, data.index(b"ispe") + 8, width, height)
    return bytes(data)


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "png-declares-60000x60000": (
        lambda: header(60_000, 60_000) + chunk(b"IDAT", zlib.compress(b"\0")),
        "too_many_pixels",
    ),
    "png-declares-2^31": (lambda: header(2**31 - 1, 2**31 - 1) + chunk(b"IDAT", b""), "too_many_pixels"),
    "png-declares-a-line-of-10^9": (lambda: header(10**9, 1) + chunk(b"IDAT", b""), "too_many_pixels"),
    "png-decompression-bomb-of-one-bit": (lambda: one_bit(20_000), "too_many_pixels"),
    "png-of-no-size": (lambda: header(0, 0) + chunk(b"IEND", b""), "too_small"),
    "png-cut-off": (lambda: cut(file_bytes(PICTURE), 0.5), "undecodable"),
    "png-large-and-cut-off": (lambda: header(7000, 7000) + chunk(b"IDAT", zlib.compress(b"\0" * 999)), "undecodable"),
    "png-without-data": (lambda: header(24, 20) + chunk(b"IEND", b""), "undecodable"),
    "png-chunk-of-4-gigabytes": (lambda: header(24, 20) + b"\xff\xff\xff\xffIDAT" + b"\0" * 20, "undecodable"),
    "png-with-two-headers": (lambda: png_with(header(60_000, 60_000)[8:]), "undecodable"),
    "png-of-no-colour-type": (lambda: header(24, 20, 8, 5) + chunk(b"IDAT", zlib.compress(b"\0" * 999)), "undecodable"),
    "png-with-broken-checksum": (lambda: file_bytes(PICTURE)[:-20] + bytes(20), "undecodable"),
    "png-profile-bomb": (lambda: png_with(chunk(b"iCCP", b"a\0\0" + big(b"\0"))), "bad_profile"),
    "png-profile-of-nonsense": (lambda: profiled(b"\xff" * 3000), "bad_profile"),
    "png-profile-of-a-million-tags": (lambda: profiled(many_tags()), "bad_profile"),
    "png-animated": (lambda: frames("PNG"), "animated"),
    "png-of-200000-chunks": (lambda: png_with(chunk(b"tEXt", b"a\0b") * 200_000), "too_many_parts"),
    "jpeg-declares-65500x65500": (
        lambda: resized_frame(file_bytes(PICTURE, "JPEG"), 65_500, 65_500),
        "too_many_pixels",
    ),
    "jpeg-of-no-height": (lambda: resized_frame(file_bytes(PICTURE, "JPEG"), 24, 0), "too_small"),
    "jpeg-large-and-cut-off": (lambda: resized_frame(file_bytes(PICTURE, "JPEG")[:-2], 7000, 7000), "undecodable"),
    "jpeg-cut-off-in-its-header": (lambda: file_bytes(PICTURE, "JPEG")[:60], "undecodable"),
    "jpeg-with-two-frame-headers": (twice_framed, "undecodable"),
    "jpeg-of-2000-scans": (lambda: many_scans(2000), "too_many_scans"),
    "jpeg-of-200000-segments": (lambda: jpeg_with(segment(0xE1, b"") * 200_000), "too_many_parts"),
    "jpeg-segment-of-no-length": (lambda: jpeg_with(b"\xff\xe1\0\0"), "undecodable"),
    "jpeg-lossless-frame": (lambda: with_frame_code(0xC3), "undecodable"),
    "jpeg-hierarchical-frame": (lambda: with_frame_code(0xC5), "undecodable"),
    "webp-declares-16384x16384": (lambda: riff(vp8x(16_384, 16_384), (b"VP8 ", webp_body())), "too_many_pixels"),
    "webp-canvas-larger-than-its-picture": (lambda: riff(vp8x(7000, 7000), (b"VP8 ", webp_body())), "undecodable"),
    "webp-lossless-declares-16384x16384": (
        lambda: riff((b"VP8L", b"\x2f" + struct.pack("<I", 16_383 | 16_383 << 14) + b"\0" * 20)),
        "too_many_pixels",
    ),
    "webp-cut-off": (lambda: cut(file_bytes(PICTURE, "WEBP"), 0.7), "undecodable"),
    "webp-animated": (lambda: frames("WEBP"), "animated"),
    "webp-of-200000-chunks": (
        lambda: riff(vp8x(24, 20), (b"VP8 ", webp_body()), *[(b"JUNK", b"")] * 200_000),
        "too_many_parts",
    ),
    "webp-without-chunks": (lambda: riff(), "undecodable"),
    "gif-of-65535x65535": (lambda: resized_gif(65_535, 65_535), "too_many_pixels"),
    "gif-animated": (lambda: frames("GIF"), "animated"),
    "gif-of-two-million-blocks": (lambda: other("GIF")[:-2] + b"\x01\0" * 2_000_000, "too_many_parts"),
    "gif-cut-off": (lambda: cut(other("GIF"), 0.5), "undecodable"),
    "bmp-declares-60000x60000": (lambda: resized_bmp(60_000, 60_000), "too_many_pixels"),
    "bmp-upside-down-declares-60000x60000": (lambda: resized_bmp(60_000, -60_000), "too_many_pixels"),
    "bmp-large-and-cut-off": (lambda: resized_bmp(7000, 7000), "undecodable"),
    "tiff-declares-60000x60000": (lambda: tiff({256: 60_000, 257: 60_000}), "too_many_pixels"),
    "tiff-large-and-cut-off": (lambda: tiff({256: 7000, 257: 7000}), "undecodable"),
    "tiff-of-tiles-of-a-billion-pixels": (lambda: tiff({322: 30_000, 323: 40_000}), "too_many_pixels"),
    "tiff-whose-tags-all-name-the-same-bytes": (
        lambda: tiff({320: 8}, counts={320: 90_000}) + bytes(50_000),
        "too_many_parts",
    ),
    "tiff-of-no-size": (lambda: tiff({256: 0}), "too_small"),
    "tiff-of-65000-samples": (lambda: tiff({277: 65_000}), "undecodable"),
    "tiff-of-pages-without-end": (lambda: endless_pages(), "too_many_parts"),
    "avif-declares-16384x16384": (lambda: resized_avif(16_384, 16_384), "too_many_pixels"),
    "avif-of-nothing": (lambda: b"\0\0\0\x1cftypavif" + bytes(50), "undecodable"),
    "psd-renamed": (lambda: b"8BPS\0\1" + bytes(100), "undecodable"),
    "eps-renamed": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n(%pipe%id) (w) file", "undecodable"),
    "ico-renamed": (lambda: other("ICO"), "undecodable"),
    "heic-renamed": (lambda: b"\0\0\0\x1cftypheic" + bytes(50), "format: HEIC"),
    "svg-of-a-billion-laughs": (
        lambda: b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "haha"><!ENTITY b "&a;&a;&a;">]><svg>&b;</svg>',
        "format: SVG",
    ),
    "html-renamed": (lambda: b"<html><script>alert(1)</script>", "format: HTML"),
    "pdf-before-a-jpeg": (lambda: b"%PDF-1.7\n" + file_bytes(PICTURE, "JPEG"), "undecodable"),
    "zip-before-a-png": (lambda: zip_bytes() + file_bytes(PICTURE), "undecodable"),
    "empty": (lambda: b"", "undecodable: empty"),
    "beyond-the-largest-file": (lambda: file_bytes(PICTURE) + bytes(101 * 2**20), "too_large"),
}
"""File and the beginning of its reason."""

PASSED_OVER: dict[str, Callable[[], bytes]] = {
    "png-ztxt-bomb": lambda: png_with(chunk(b"zTXt", b"a\0\0" + big(b"a")) * 4),
    "png-itxt-bomb": lambda: png_with(chunk(b"iTXt", b"a\0\1\0\0\0" + big(b"\xf0\x9f\x98\x80")) * 4),
    "png-exif-bomb": lambda: png_with(chunk(b"eXIf", exif_bomb(2**20))),
    "png-exif-that-names-itself": lambda: png_with(chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + b"\x69\x87" * 6000)),
    "jpeg-exif-bomb": lambda: jpeg_with(
        *(segment(0xE1, b"Exif\0\0" + exif_bomb(2**20)[at : at + 60_000]) for at in range(0, 2**20, 60_000))
    ),
    "jpeg-exif-of-nonsense": lambda: jpeg_with(segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 60_000)),
    "jpeg-that-lists-pictures-it-has-not": lambda: jpeg_with(segment(0xE2, b"MPF\0" + exif_bomb(60_000))),
    "jpeg-of-1000-comments": lambda: jpeg_with(segment(0xFE, b"x" * 65_000) * 1000),
    "webp-exif-bomb": lambda: riff(vp8x(24, 20, 8), (b"VP8 ", webp_body()), (b"EXIF", exif_bomb(2**20))),
    "tiff-exif-bomb": lambda: tiff_with_exif(),
    "zip-behind-a-png": lambda: file_bytes(PICTURE) + zip_bytes(),
    "html-behind-a-jpeg": lambda: file_bytes(PICTURE, "JPEG") + b"<script>alert(1)</script>" * 1000,
}
"""Files whose picture is good: it comes out as from the same file without the rest."""
