"""Reads a tar as samples, which are consecutive members of one key, such as `0007.jpg` and `0007.txt`.

A tar's headers are not trusted: they may name sizes, files and places that do not exist. Names are labels here and
never paths, nothing is unpacked, and links and devices are not followed.
"""

import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, cast

from d2f_core.data.image_headers import too_large
from d2f_core.data.sources.sample import ALL_IMAGE_SUFFIXES
from d2f_core.s3_calls import read_on
from d2f_core.storage import filesystem

MAX_MEMBERS = 100
"""Most members of one sample: all of a sample's members are held in memory together."""
MAX_IN_BETWEEN = 10_000
"""Most consecutive folder entries and leftovers."""
MAX_KEYS = 200_000
"""Most keys that `scattered_keys` keeps in memory."""
HEADER_BYTES, MAX_FIELDS = 16_384, 64
"""Most bytes that the headers of one member may take, and most extended (pax) fields that it may have."""
PROBED = 64
"""Samples from which a tar's bytes per sample are estimated."""
DIGITS = re.compile(rb"\d{256}")
"""Runs of digits that are refused: the tar module parses one in time quadratic in its length."""

DAMAGE = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError)
"""Errors that the tar module raises on a damaged archive: its own, and those of int(), decode() and nested headers."""

Members = Mapping[str, bytes | str]
"""One sample's members by their extension (".jpg", ".seg.png"): the contents as bytes, or the reason for not reading
them as a string."""


Limit = Callable[[str], int | None]
"""Function of a member's extension: the most bytes that are read, or None if the member is not needed (contents
b"")."""


class DamagedArchiveError(ValueError):
    """The rest of a tar cannot be read; the message is the ledger's reason, `rows` the samples that the rest held,
    estimated, at least 1.
    """

    def __init__(self, reason: str, rows: int) -> None:
        super().__init__(reason)
        self.rows = rows


@dataclass(frozen=True, kw_only=True)
class Sibling:
    """Another tar of the same source, of the usual size."""

    uri: str
    size: int
    """Bytes."""


@dataclass(kw_only=True)
class _Place:
    """How far a tar was read."""

    samples: int = 0
    position: int = 0
    """Bytes from the start to the end of the last member that was read."""
    size: int = 0
    """Bytes that the tar has."""
    cut: bool = False
    """Whether it ends where a member or the end mark should go on."""


def siblings(sizes: Mapping[str, int | None]) -> dict[str, Sibling | None]:
    """For each tar another one of the median size; None for the only one.

    Args:
        sizes: bytes by URI; None for what is no plain file.
    """
    known = sorted((size, uri) for uri, size in sizes.items() if size is not None)
    middle = len(known) // 2
    found: dict[str, Sibling | None] = {}
    for uri in sizes:
        at = middle - 1 if known and known[middle][1] == uri else middle
        found[uri] = Sibling(uri=known[at][1], size=known[at][0]) if 0 <= at < len(known) else None
    return found


def read_tar(uri: str, most_bytes: Limit, sibling: Sibling | None = None) -> Iterator[tuple[str, Members]]:
    """Key and members of each sample of a tar.

    Args:
        sibling: another tar of the same source, from which is estimated what a damaged one held.

    Raises:
        DamagedArchiveError: after the samples that could be read.
    """
    place = _Place()
    try:
        yield from read_on(uri, lambda: _opened(uri, most_bytes, place), lambda error: isinstance(error, DAMAGE))
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
        rows = _lost(place, sibling)
        about = f"; by its size it held about {rows} more" if rows > 1 else ""
        raise DamagedArchiveError(
            f"damaged_archive: nothing can be read after {place.samples} samples ({reason}{about})", rows
        ) from None


def _lost(place: _Place, sibling: Sibling | None) -> int:
    """Samples in the part of a damaged tar that was not read. One that was cut off had the size of its siblings."""
    size = max(place.size, sibling.size) if place.cut and sibling else place.size
    samples, read = place.samples, place.position
    if sibling and samples < PROBED:
        more, more_read = _probe(sibling.uri)
        samples, read = samples + more, read + more_read
    return max(1, round((size - place.position) * samples / read)) if read else 1


def samples_in(size: int, sibling: Sibling | None) -> int:
    """Samples in a tar of so many bytes that cannot be read, estimated; at least 1."""
    return _lost(_Place(size=size), sibling)


def _probe(uri: str) -> tuple[int, int]:
    """The number of samples in a tar's first part, and that part's bytes; no image is read."""
    place = _Place()
    with suppress(*DAMAGE):
        for _ in islice(_opened(uri, lambda _: None, place), PROBED):
            pass
    return place.samples, place.position


def scattered_keys(uri: str) -> dict[str, int]:
    """Keys whose members do not follow one another, though they make up one sample at most, with the number of the
    first group of its members; of the readable part of a tar.
    """
    first: dict[str, tuple[int, bool]] = {}
    scattered: dict[str, int] = {}
    last = None
    with suppress(*DAMAGE):
        for number, (key, members) in enumerate(_opened(uri, lambda _: None, _Place())):
            has_image = any(suffix in members for suffix in ALL_IMAGE_SUFFIXES)
            # Groups of one key in a row are those of names with dots.
            if key in first and key != last and not (has_image and first[key][1]):
                scattered[key] = first[key][0]
            first.setdefault(key, (number, has_image))
            last = key
            if len(first) >= MAX_KEYS:
                break
    return scattered


def _opened(uri: str, most_bytes: Limit, place: _Place) -> Iterator[tuple[str, Members]]:
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as handle:
        file = _Rationed(handle, fs.size(path))
        place.samples, place.position, place.size = 0, 0, file.size
        try:
            yield from _samples(file, most_bytes, place)
        except DAMAGE:
            place.cut = file.cut or file.tell() >= file.size
            raise


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member: the file name up to its first dot, and the rest in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return folder + slash + stem, (dot + extension).lower()


class _Rationed:
    """A file that returns at most `ration` bytes, as the tar module reads as many as a header declares."""

    def __init__(self, handle: IO[bytes], size: int) -> None:
        self.handle, self.size, self.ration = handle, size, HEADER_BYTES
        self.cut = False

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.ration:
            raise tarfile.ReadError(f"a header of more than {HEADER_BYTES} bytes")
        self.ration -= size
        data = self.handle.read(size)
        if DIGITS.search(data):
            raise tarfile.ReadError("a header with an endless number")
        return data

    def seek(self, position: int) -> int:
        return self.handle.seek(position)

    def tell(self) -> int:
        return self.handle.tell()

    def contents(self, member: tarfile.TarInfo) -> bytes:
        """All bytes of a plain member whose size was checked."""
        self.handle.seek(member.offset_data)
        data = self.handle.read(member.size)
        if len(data) != member.size:
            self.cut = True
            raise tarfile.ReadError(f"{member.name} is cut off")
        return data


def _members(archive: tarfile.TarFile, file: _Rationed) -> Iterator[tarfile.TarInfo]:
    """Members in order, none kept in memory; raises ReadError when the file lacks a tar's end marker."""
    before = -1
    while True:
        file.ration = HEADER_BYTES
        member = archive.next()
        if member is None:
            break
        cast(Any, archive).members.clear()  # or the module would keep every member in memory
        if not before < archive.offset <= file.size:
            file.cut = archive.offset > file.size
            raise tarfile.ReadError(f"{member.name} has {member.size} bytes by its header, the whole file {file.size}")
        if max(len(archive.pax_headers), len(member.pax_headers)) > MAX_FIELDS:
            raise tarfile.ReadError(f"{member.name} has more than {MAX_FIELDS} extended fields")
        before = archive.offset
        yield member
    file.seek(archive.offset)
    file.ration = HEADER_BYTES
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # the module would accept it as complete
        raise tarfile.ReadError("no end mark")


def _samples(file: _Rationed, most_bytes: Limit, place: _Place) -> Iterator[tuple[str, Members]]:
    # Names that are not UTF-8 are escaped, so that they stay distinct and can be stored in a table.
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:", errors="backslashreplace") as archive:
        last, contents, damage = "", dict[str, bytes | str](), None
        named, number = _named(archive, file), 0
        try:
            for key, extension, member in named:
                if contents and (key != last or _full_of_dots(number, contents)):
                    place.samples += 1
                    yield last, contents
                    contents, number = {}, 0
                last, number = key, number + 1
                if number > MAX_MEMBERS:
                    raise tarfile.ReadError(f"more than {MAX_MEMBERS} members under the key {key}")
                contents[extension] = _contents(file, member, most_bytes(extension))
                place.position = archive.offset
        except DAMAGE as error:  # earlier members form a sample, which must not be lost
            damage = error
        if contents:
            place.samples += 1
            yield last, contents
        if damage:
            raise damage


def _full_of_dots(number: int, contents: Members) -> bool:
    """Whether a full group holds files with dots in their names, such as `img.0001.jpg`, which are samples each."""
    return number == MAX_MEMBERS == len(contents) and all(extension.count(".") > 1 for extension in contents)


def is_leftover(name: str) -> bool:
    """Whether a member is what operating systems and editors leave beside files."""
    base = name.rpartition("/")[2].lower()
    return base.startswith(".") or base.endswith((".swp", "~")) or base in ("thumbs.db", "desktop.ini")


def _named(archive: tarfile.TarFile, file: _Rationed) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    passed_over = 0
    for member in _members(archive, file):
        passed_over = passed_over + 1 if member.isdir() or is_leftover(member.name) else 0
        if passed_over > MAX_IN_BETWEEN:
            raise tarfile.ReadError(f"more than {MAX_IN_BETWEEN} folders and leftovers in a row")
        if not passed_over:
            yield *split_name(member.name), member


def _contents(file: _Rationed, member: tarfile.TarInfo, most: int | None) -> bytes | str:
    if not member.isfile() or member.issparse():
        what = "a sparse file" if member.issparse() else "a link" if member.islnk() or member.issym() else "no file"
        return f"not_a_file: {member.name} is {what}"
    if most is None:
        return b""
    return file.contents(member) if member.size <= most else too_large(member.size, most)
