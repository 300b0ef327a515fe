"""A folder of images, with `same_stem.txt` beside each or one `metadata.jsonl` / `captions.jsonl` per folder."""

import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

from d2f_core.data.image_headers import MAX_IMAGE_BYTES
from d2f_core.data.sources.listing import file_problem
from d2f_core.data.sources.sample import (
    ALL_IMAGE_SUFFIXES,
    CAPTION_TABLES,
    MAX_TEXT_BYTES,
    Sample,
    SourceError,
    find_caption,
    whole_text,
)
from d2f_core.storage import read_bytes

READ_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class FolderEntry:
    """One image and the place of its caption."""

    uri: str
    caption: str | None = None
    """Caption from a caption table."""
    caption_uri: str | None = None
    """URI of the caption file beside the image."""
    problem: str | None = None
    """Why image or caption cannot be read; None when they can."""


@dataclass(frozen=True, kw_only=True)
class FolderShard:
    entries: tuple[FolderEntry, ...]

    @property
    def num_rows(self) -> int:
        return len(self.entries)

    def read(self) -> Iterator[Sample]:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            yield from pool.map(_read_entry, self.entries)


def _read_entry(entry: FolderEntry) -> Sample:
    name = whole_text(entry.uri)  # a disk's file names need not be UTF-8
    if entry.problem:
        return Sample(source_uri=name, image=None, caption=entry.caption, problem=entry.problem)
    caption = entry.caption
    if entry.caption_uri is not None:
        # Bytes that are not UTF-8 become U+FFFD, which the caption check refuses: no encoding is guessed.
        caption = read_bytes(entry.caption_uri).decode("utf-8", errors="replace")
    return Sample(source_uri=name, image=read_bytes(entry.uri), caption=caption)


def plan_folder(
    sizes: Mapping[str, int | None], caption_column: str | None, rows_per_shard: int, *, captions: bool = True
) -> list[FolderShard]:
    """Split the images among the files, sorted by name, into shards.

    Args:
        sizes: bytes of each file by its URI; None for a device, a pipe or anything else that may never end.
        captions: False ignores the captions.

    Raises:
        SourceError: captions in both forms, or a caption table that cannot be read.
    """
    images = sorted(uri for uri in sizes if uri.lower().endswith(ALL_IMAGE_SUFFIXES))
    tables = sorted(uri for uri in sizes if captions and PurePosixPath(uri).name in CAPTION_TABLES)
    stems = {image.rpartition(".")[0] for image in images}
    texts = {uri for uri in sizes if captions and uri.endswith(".txt") and uri.removesuffix(".txt") in stems}
    if tables and texts:
        raise SourceError(f"Captions both in {tables[0]!r} and in files such as {min(texts)!r}. Keep one of the two.")
    if tables:
        entries = _entries_of_tables(images, tables, caption_column, sizes)
    else:
        names = [(image, image.rpartition(".")[0] + ".txt") for image in images]
        entries = [_entry(image, text if text in texts else None, sizes) for image, text in names]
    cuts = range(0, len(entries), rows_per_shard)
    return [FolderShard(entries=tuple(entries[cut : cut + rows_per_shard])) for cut in cuts]


def _entry(image: str, text: str | None, sizes: Mapping[str, int | None]) -> FolderEntry:
    problem = file_problem("no_image", image, sizes, MAX_IMAGE_BYTES)
    if text and not problem:
        problem = file_problem("bad_caption", text, sizes, MAX_TEXT_BYTES)
    return FolderEntry(uri=image, caption_uri=text, problem=problem)


def _entries_of_tables(
    images: list[str], tables: list[str], caption_column: str | None, sizes: Mapping[str, int | None]
) -> list[FolderEntry]:
    captions: dict[str, str | None] = {}
    for table in tables:
        if sizes[table] is None:
            raise SourceError(f"{table!r} is no plain file. Replace it by one, or remove it.")
        captions.update(_read_caption_table(table, caption_column))
    uris = sorted({*images, *captions})
    return [
        FolderEntry(uri=uri, caption=captions.get(uri), problem=file_problem("no_image", uri, sizes, MAX_IMAGE_BYTES))
        for uri in uris
    ]


def _read_caption_table(uri: str, caption_column: str | None) -> dict[str, str | None]:
    """Captions by image URI; file names are relative to the caption table's folder."""
    folder = uri.rpartition("/")[0]
    captions = {}
    try:
        # Not `splitlines`, which also cuts at U+2028 and others that JSON lets stand in a caption.
        lines = re.split("\r\n|\r|\n", read_bytes(uri).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SourceError(f"{uri!r} is not UTF-8 ({error}). Save it as UTF-8.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            name = record["file_name"]
        except (ValueError, KeyError, TypeError, RecursionError):
            example = '{"file_name": "a.png", "text": "a cat"}'
            raise SourceError(f"{uri!r}, line {number} is not an object such as {example}.") from None
        captions[f"{folder}/{str(name).removeprefix('./')}"] = find_caption(record, caption_column)
    return captions
