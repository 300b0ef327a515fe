"""Tars and parquet files that were made to hurt, built in code."""

import io
import json
import os
import struct
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.pictures import file_bytes, pixels

GOOD = file_bytes(pixels(1))
END = bytes(1024)


def member(name: str, content: bytes = b"", *, size: int | None = None, kind: bytes = tarfile.REGTYPE, **more) -> bytes:
    """A header with its data; the size that it declares may be another."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content) if size is None else size
    for key, value in more.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def sample(key: str = "0") -> bytes:
    return member(f"{key}.png", GOOD) + member(f"{key}.txt", b"a caption")


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return member("pax", records, kind=kind)


def negative_size() -> bytes:
    header = bytearray(member("9.png"))
    header[124:136] = b"\xff" * 11 + b"\0"  # base 256, below zero
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


def gnu_sparse(size: int) -> bytes:
    """An old GNU sparse member of `size` bytes, none of which is there."""
    header = bytearray(member("9.png", kind=tarfile.GNUTYPE_SPARSE))
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


def pax_record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n"
    length = len(body) + len(str(len(body) + 2))
    return f"{length}{body}".encode()


def in_lumps(block: bytes, count: int) -> Iterable[bytes]:
    yield from [block * 10_000] * (count // 10_000)


TARS: dict[str, tuple[Callable[[], Iterable[bytes]], str]] = {
    "a-million-members-of-one-key": (lambda: in_lumps(member("9.txt"), 10**6), "damaged_archive"),
    "a-million-folders": (lambda: in_lumps(member("f/", kind=tarfile.DIRTYPE), 10**6), "damaged_archive"),
    "size-of-8-exabytes": (lambda: [sample(), member("9.png", size=2**63 - 1)], "damaged_archive"),
    "size-below-zero": (lambda: [sample(), negative_size()], "damaged_archive"),
    "size-by-an-extended-header": (
        lambda: [sample(), pax(pax_record("size", "9" * 18)), member("9.png"), END],
        "damaged_archive",
    ),
    "size-that-is-no-number": (lambda: [pax(pax_record("size", "x")), member("9.png", GOOD), END], "damaged_archive"),
    "name-of-4-gigabytes": (
        lambda: [sample(), member("././@LongLink", b"x" * 10**6, size=2**32, kind=tarfile.GNUTYPE_LONGNAME)],
        "damaged_archive",
    ),
    "name-of-100-megabytes": (
        lambda: [member("././@LongLink", b"x" * 10**8, kind=tarfile.GNUTYPE_LONGNAME), member("9.png"), END],
        "damaged_archive",
    ),
    "10000-long-names-in-a-row": (
        lambda: [member("././@LongLink", b"x", kind=tarfile.GNUTYPE_LONGNAME) * 10_000, member("9.png"), END],
        "damaged_archive",
    ),
    "extended-header-of-100-megabytes": (
        lambda: [pax(pax_record("comment", "x" * 10**8)), member("9.png"), END],
        "damaged_archive",
    ),
    "extended-fields-that-overlap": (
        lambda: [pax(b"2 " * 8000 + b"="), member("9.png"), END] * 50,
        "damaged_archive",
    ),
    "extended-header-of-digits": (lambda: [pax(b"1" * 15_000), member("9.png"), END] * 50, "damaged_archive"),
    "global-headers-that-add-up": (
        lambda: (pax(pax_record(f"k{n}", "x" * 15_000), tarfile.XGLTYPE) + sample(str(n)) for n in range(5000)),
        "damaged_archive",
    ),
    "sparse-of-a-terabyte": (lambda: [gnu_sparse(2**40), END], "not_a_file"),
    "sparse-by-extended-header": (
        lambda: [
            pax(pax_record("GNU.sparse.map", "0,1") + pax_record("GNU.sparse.size", str(2**40))),
            member("9.png", b"x"),
            END,
        ],
        "not_a_file",
    ),
    "sparse-map-that-never-ends": (
        lambda: [
            pax(pax_record("GNU.sparse.major", "1") + pax_record("GNU.sparse.minor", "0")),
            member("9.png", b"9999999\n" + b"1\n" * 10**6),
            END,
        ],
        "damaged_archive",
    ),
    "climbing-path": (lambda: [sample("../../../../tmp/9"), END], "bad_name"),
    "symbolic-link": (
        lambda: [member("9.png", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), member("9.txt", b"a"), END],
        "not_a_file",
    ),
    "hard-link": (lambda: [member("9.png", kind=tarfile.LNKTYPE, linkname="0.png"), END], "not_a_file"),
    "character-device": (lambda: [member("9.png", kind=tarfile.CHRTYPE, devmajor=1, devminor=5), END], "not_a_file"),
    "pipe": (lambda: [member("9.png", kind=tarfile.FIFOTYPE), END], "not_a_file"),
    "unknown-type-of-member": (lambda: [member("9.png", GOOD, kind=b"Q"), END], "not_a_file"),
    "image-of-101-megabytes": (lambda: [member("9.png", bytes(101 * 2**20)), END], "too_large"),
    "caption-of-2-megabytes": (lambda: [member("9.png", GOOD), member("9.txt", b"a" * 2**21), END], "bad_caption"),
    "json-of-50000-brackets": (lambda: [member("9.png", GOOD), member("9.json", b"[" * 50_000), END], ""),
    "name-that-is-no-text": (lambda: [member("\udcff\udcfe.png", GOOD, kind=b"0"), END], ""),
    "json-with-half-a-character": (
        lambda: [member("9.png", GOOD), member("9.json", b'{"text": "\\ud800"}'), END],
        "",
    ),
    "nonsense": (lambda: [os.urandom(100_000)], "damaged_archive"),
    "cut-off-in-a-header": (lambda: [sample(), member("9.png", GOOD)[:300]], "damaged_archive"),
    "header-overwritten": (lambda: [sample(), b"\xff" * 512, sample("1"), END], "damaged_archive"),
}
"""Blocks of the file, and the beginning of the reason for what is not read; "" where all of it is."""


def write_tar(path: Path, blocks: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)


def table(images: list[bytes], captions: list[str] | None = None, **how) -> bytes:
    sink = io.BytesIO()
    rows = pa.table({"image": pa.array(images, pa.binary()), "text": captions or ["a"] * len(images)})
    pq.write_table(rows, sink, **how)
    return sink.getvalue()


def dictionary(value: bytes, rows: int) -> bytes:
    """A table that holds a value once, and names it in each row."""
    images = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value], pa.binary()))
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": images, "text": ["a"] * rows}), sink, store_schema=False)
    return sink.getvalue()


def lying_page(uncompressed: int) -> bytes:
    """The header of the images' page declares another size than its data have."""
    data = bytearray(table([GOOD] * 3, compression="snappy", use_dictionary=False))
    start = pq.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(0).column(0).data_page_offset
    # Thrift's compact form: field 1 (type) is 15 00, field 2 (bytes unpacked) 15 and a zigzag number.
    at = start + 3
    end = at
    while data[end] & 0x80:
        end += 1
    length = end - at + 1
    number, coded = uncompressed << 1, bytearray()
    for _ in range(length - 1):
        coded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(data[:at] + coded + bytes([number & 0x7F]) + data[end + 1 :])


def footer_of(length: int) -> bytes:
    data = table([GOOD])
    return data[:-8] + struct.pack("<I", length) + b"PAR1"


def raw_text(text: bytes) -> bytes:
    """A table whose column of text holds other bytes."""
    column = pa.array([text], pa.binary()).view(pa.string())
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array([GOOD], pa.binary()), "text": column}), sink)
    return sink.getvalue()


PARQUETS: dict[str, tuple[Callable[[], bytes], str]] = {
    "page-that-declares-more-than-it-has": (lambda: lying_page(1_000_000), "damaged_file"),
    "footer-of-2-gigabytes": (lambda: footer_of(2**31 - 1), "SourceError"),
    "footer-of-nonsense": (lambda: table([GOOD])[:4] + os.urandom(5000) + b"\x88\x13\0\0PAR1", "SourceError"),
    "cut-off": (lambda: table([GOOD] * 50)[:3000], "SourceError"),
    "one-value-of-300-megabytes": (lambda: table([bytes(300 * 2**20)], compression="zstd"), "damaged_file"),
    "1000-values-of-1-megabyte": (
        lambda: table([bytes(2**20)] * 1000, compression="zstd", use_dictionary=False),
        "damaged_file",
    ),
    "one-long-value-named-by-100-rows": (lambda: dictionary(os.urandom(12 * 2**20), 100), "undecodable"),
    "caption-of-2-megabytes": (lambda: table([GOOD], ["a" * 2**21]), "too_large"),
    "caption-that-is-no-text": (lambda: raw_text(b"\xff\xfe\xfd"), ""),
}
"""File, and the beginning of the reason."""


def safetensors_header(length: int, content: bytes) -> bytes:
    return struct.pack("<Q", length) + content


def tensor(name: str, shape: list[int], offsets: list[int]) -> bytes:
    content = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return safetensors_header(len(content), content)


def many_tensors(count: int) -> bytes:
    content = json.dumps(
        {f"{n}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in range(count)}
    ).encode()
    return safetensors_header(len(content), content)


SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "header-of-8-exabytes": lambda: safetensors_header(2**63 - 1, b"{}"),
    "header-of-2-gigabytes": lambda: safetensors_header(2**31, b"{}" + bytes(1000)),
    "header-longer-than-the-file": lambda: safetensors_header(10_000_000, b'{"a":'),
    "header-of-99-megabytes-of-brackets": lambda: safetensors_header(99_000_000, b'{"a":' + b"[" * 98_999_995),
    "header-of-60000-tensors-of-nothing": lambda: many_tensors(60_000),
    "tensor-of-a-terabyte": lambda: tensor("a", [2**38], [0, 2**40]),
    "shape-that-overflows": lambda: tensor("a", [2**62, 2**62], [0, 4]),
    "offsets-outside-the-file": lambda: tensor("a", [1], [2**40, 2**40 + 4]),
    "a-pickle": lambda: b"\x80\x04\x95" + bytes(100),
}
