"""Webdataset tars: consecutive members of one key are one sample, such as `0007.jpg` and `0007.txt` or `0007.json`."""

import itertools
import json
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import IO

from d2f_core.data.sources.sample import ALL_IMAGE_SUFFIXES, Sample, find_caption
from d2f_core.storage import filesystem

END_BYTES = 1024
"""A tar ends with two blocks of zeros."""

Members = Mapping[str, bytes]
"""Contents of one sample's members by their extension (".jpg", ".seg.png")."""


@dataclass(frozen=True, kw_only=True)
class TarShard:
    """One tar. It is read from front to back, so one tar is never shared between tasks."""

    uri: str
    caption_column: str | None = None

    @property
    def num_rows(self) -> None:
        return None

    def read(self) -> Iterator[Sample]:
        fs, path = filesystem(self.uri)
        count = 0
        with fs.open(path, "rb") as handle:
            try:
                for key, members in _samples(handle):
                    yield _sample(f"{self.uri}#{key}", members, self.caption_column)
                    count += 1
                if any(fs.tail(path, END_BYTES)):  # the module takes a cut-off tar for a finished one
                    raise tarfile.ReadError("no end mark")
            except tarfile.TarError as error:
                problem = f"damaged_archive: nothing can be read after {count} samples ({error})"
                yield Sample(source_uri=self.uri, image=None, caption=None, problem=problem)


def plan_tars(files: Collection[str], caption_column: str | None) -> list[TarShard]:
    """One shard per tar among `files`, in the order of their names."""
    tars = sorted(uri for uri in files if uri.endswith(".tar"))
    return [TarShard(uri=uri, caption_column=caption_column) for uri in tars]


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member: the file name up to its first dot, and the rest in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return folder + slash + stem, (dot + extension).lower()


def _samples(handle: IO[bytes]) -> Iterator[tuple[str, Members]]:
    with tarfile.open(fileobj=handle, mode="r|") as archive:
        named = ((*split_name(member.name), member) for member in archive if member.isfile())
        for key, group in itertools.groupby(named, key=lambda item: item[0]):
            contents = {}
            for _, extension, member in group:
                stream = archive.extractfile(member)
                contents[extension] = stream.read() if stream is not None else b""
                if len(contents[extension]) != member.size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
            yield key, contents


def _sample(source_uri: str, members: Members, caption_column: str | None) -> Sample:
    extension = next((name for name in ALL_IMAGE_SUFFIXES if name in members), None)
    caption = _caption(members, caption_column)
    if extension is None:
        problem = f"no_image: only {', '.join(sorted(members))} under this key"
        return Sample(source_uri=source_uri, image=None, caption=caption, problem=problem)
    return Sample(source_uri=source_uri + extension, image=members[extension], caption=caption)


def _caption(members: Members, caption_column: str | None) -> str | None:
    """From the text member, or from the JSON member when there is no text or a column is asked for."""
    for extension in (".txt", ".caption"):
        if extension in members and caption_column is None:
            return members[extension].decode("utf-8", errors="replace")
    try:
        record = json.loads(members.get(".json", b"{}"))
    except ValueError:
        return None
    return find_caption(record, caption_column) if isinstance(record, dict) else None
