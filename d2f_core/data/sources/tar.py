"""Webdataset tars: consecutive members of one key are one sample, such as `0007.jpg` and `0007.txt` or `0007.json`.

A tar's headers are not trusted: they may name sizes, files and places that do not exist. Names are labels here and
never paths, nothing is unpacked, and links and devices are not followed.
"""

import json
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

from d2f_core.data.image_headers import MAX_IMAGE_BYTES, too_large
from d2f_core.data.sources.sample import ALL_IMAGE_SUFFIXES, MAX_TEXT_BYTES, Sample, find_caption
from d2f_core.s3_calls import read_on
from d2f_core.storage import filesystem

TEXT_SUFFIXES, JSON_SUFFIX = (".txt", ".caption"), ".json"
MAX_MEMBERS = 100
"""Most members of one sample: all of a sample's members are held in memory together."""
MAX_IN_BETWEEN = 10_000
"""Most consecutive folder entries."""
HEADER_BYTES, MAX_FIELDS = 16_384, 64
"""Most bytes that the headers of one member may take, and most extended (pax) fields that it may have."""
DIGITS = re.compile(rb"\d{256}")
"""Runs of digits that are refused: the tar module parses one in time quadratic in its length."""

CLIMBS = "bad_name: it climbs out of its folder"

DAMAGE = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError)
"""Errors that the tar module raises on a damaged archive: its own, and those of int(), decode() and nested headers."""

Members = Mapping[str, bytes | str]
"""One sample's members by their extension (".jpg", ".seg.png"): the contents as bytes, or the reason for not reading
them as a string."""


Limit = Callable[[str], int | None]
"""Function of a member's extension: the most bytes that are read, or None if the member is not needed (contents
b"")."""


class DamagedArchiveError(ValueError):
    """The rest of a tar cannot be read; the message is the ledger's reason."""


@dataclass(frozen=True, kw_only=True)
class TarShard:
    """One tar, read sequentially and therefore by a single task."""

    uri: str
    caption_column: str | None = None
    captions: bool = True

    @property
    def num_rows(self) -> None:
        return None

    def read(self) -> Iterator[Sample]:
        try:
            for key, members in read_tar(self.uri, _most_bytes if self.captions else _most_bytes_of_images):
                yield _sample(self, key, members)
        except DamagedArchiveError as error:
            yield Sample(source_uri=self.uri, image=None, caption=None, problem=str(error))


def plan_tars(files: Collection[str], caption_column: str | None, *, captions: bool = True) -> list[TarShard]:
    """One shard per tar among `files`, sorted by name."""
    tars = sorted(uri for uri in files if uri.endswith(".tar"))
    return [TarShard(uri=uri, caption_column=caption_column, captions=captions) for uri in tars]


def read_tar(uri: str, most_bytes: Limit) -> Iterator[tuple[str, Members]]:
    """Key and members of each sample of a tar.

    Raises:
        DamagedArchiveError: after the samples that could be read.
    """
    count = 0
    try:
        for sample in read_on(uri, lambda: _opened(uri, most_bytes), lambda error: isinstance(error, DAMAGE)):
            yield sample
            count += 1
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise DamagedArchiveError(f"damaged_archive: nothing can be read after {count} samples ({reason})") from None


def _opened(uri: str, most_bytes: Limit) -> Iterator[tuple[str, Members]]:
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as handle:
        yield from _samples(_Rationed(handle, fs.size(path)), most_bytes)


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member: the file name up to its first dot, and the rest in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return folder + slash + stem, (dot + extension).lower()


def climbs(key: str) -> bool:
    """Whether a member's name points outside its folder (path traversal)."""
    return ".." in key.split("/")


class _Rationed:
    """A file that returns at most `ration` bytes, as the tar module reads as many as a header declares."""

    def __init__(self, handle: IO[bytes], size: int) -> None:
        self.handle, self.size, self.ration = handle, size, HEADER_BYTES

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
            raise tarfile.ReadError(f"{member.name} has {member.size} bytes by its header, the whole file {file.size}")
        if max(len(archive.pax_headers), len(member.pax_headers)) > MAX_FIELDS:
            raise tarfile.ReadError(f"{member.name} has more than {MAX_FIELDS} extended fields")
        before = archive.offset
        yield member
    file.seek(archive.offset)
    file.ration = HEADER_BYTES
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # the module would accept it as complete
        raise tarfile.ReadError("no end mark")


def _samples(file: _Rationed, most_bytes: Limit) -> Iterator[tuple[str, Members]]:
    # Names that are not UTF-8 are escaped, so that they stay distinct and can be stored in a table.
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:", errors="backslashreplace") as archive:
        last, contents, damage = "", dict[str, bytes | str](), None
        named, number = _named(archive, file), 0
        try:
            for key, extension, member in named:
                if key != last and contents:
                    yield last, contents
                    contents, number = {}, 0
                last, number = key, number + 1
                if number > MAX_MEMBERS:
                    raise tarfile.ReadError(f"more than {MAX_MEMBERS} members under the key {key}")
                contents[extension] = _contents(file, member, most_bytes(extension))
        except DAMAGE as error:  # earlier members form a sample, which must not be lost
            damage = error
        if contents:
            yield last, contents
        if damage:
            raise damage


def _named(archive: tarfile.TarFile, file: _Rationed) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    folders = 0
    for member in _members(archive, file):
        folders = folders + 1 if member.isdir() else 0
        if folders > MAX_IN_BETWEEN:
            raise tarfile.ReadError(f"more than {MAX_IN_BETWEEN} folders in a row")
        if not folders:
            yield *split_name(member.name), member


def _contents(file: _Rationed, member: tarfile.TarInfo, most: int | None) -> bytes | str:
    if not member.isfile() or member.issparse():
        what = "a sparse file" if member.issparse() else "a link" if member.islnk() or member.issym() else "no file"
        return f"not_a_file: {member.name} is {what}"
    if most is None:
        return b""
    return file.contents(member) if member.size <= most else too_large(member.size, most)


def _most_bytes_of_images(extension: str) -> int | None:
    return MAX_IMAGE_BYTES if extension in ALL_IMAGE_SUFFIXES else None


def _most_bytes(extension: str) -> int | None:
    text = extension in TEXT_SUFFIXES or extension == JSON_SUFFIX
    return MAX_TEXT_BYTES if text else _most_bytes_of_images(extension)


def _sample(shard: TarShard, key: str, members: Members) -> Sample:
    extension = next((name for name in ALL_IMAGE_SUFFIXES if name in members), None)
    source_uri = f"{shard.uri}#{key}{extension or ''}"
    image = members[extension] if extension else f"no_image: only {', '.join(sorted(members))} under this key"
    problem = image if isinstance(image, str) else None
    if climbs(key):
        problem = CLIMBS
    caption = _caption(members, shard.caption_column) if shard.captions else None
    if isinstance(caption, ValueError):
        problem, caption = problem or f"bad_caption: {caption}", None
    image = None if problem or isinstance(image, str) else image
    return Sample(source_uri=source_uri, image=image, caption=caption, problem=problem)


def _caption(members: Members, caption_column: str | None) -> str | ValueError | None:
    """Caption from the text member, or from the JSON member if there is no text or a column was given."""
    names = (JSON_SUFFIX,) if caption_column else (*TEXT_SUFFIXES, JSON_SUFFIX)
    name = next((name for name in names if name in members), None)
    contents = members[name] if name else b"{}"
    if isinstance(contents, str):
        return ValueError(contents)
    if name in TEXT_SUFFIXES:
        return contents.decode("utf-8", errors="replace")
    try:
        record = json.loads(contents)
    except (ValueError, RecursionError):
        return None
    return find_caption(record, caption_column) if isinstance(record, dict) else None
