"""A folder of images, with `same_stem.txt` beside each or one `metadata.jsonl` / `captions.jsonl` per folder."""

import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

from d2f_core.data.sources.sample import ALL_IMAGE_SUFFIXES, Sample, SourceError, find_caption
from d2f_core.storage import read_bytes

CAPTION_TABLES = ("metadata.jsonl", "captions.jsonl")
READ_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class FolderEntry:
    """One image and where its caption is."""

    uri: str
    caption: str | None = None
    """From a caption table."""
    caption_uri: str | None = None
    """Of the caption file beside the image."""
    missing: bool = False
    """Named in a caption table, but not there."""


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
    if entry.missing:
        problem = "no_image: the file is not there"
        return Sample(source_uri=entry.uri, image=None, caption=entry.caption, problem=problem)
    caption = entry.caption
    if entry.caption_uri is not None:
        # What is not UTF-8 becomes U+FFFD here, which the caption check refuses: no encoding is guessed.
        caption = read_bytes(entry.caption_uri).decode("utf-8", errors="replace")
    return Sample(source_uri=entry.uri, image=read_bytes(entry.uri), caption=caption)


def plan_folder(files: Collection[str], caption_column: str | None, rows_per_shard: int) -> list[FolderShard]:
    """Cut the images among `files` (URIs), in the order of their names, into shards.

    Raises:
        SourceError: captions in both forms, or a caption table that cannot be read.
    """
    images = sorted(uri for uri in files if uri.lower().endswith(ALL_IMAGE_SUFFIXES))
    tables = sorted(uri for uri in files if PurePosixPath(uri).name in CAPTION_TABLES)
    stems = {image.rpartition(".")[0] for image in images}
    texts = {uri for uri in files if uri.endswith(".txt") and uri.removesuffix(".txt") in stems}
    if tables and texts:
        raise SourceError(f"Captions both in {tables[0]!r} and in files such as {min(texts)!r}. Keep one of the two.")
    if tables:
        entries = _entries_of_tables(images, tables, caption_column)
    else:
        names = [(image, image.rpartition(".")[0] + ".txt") for image in images]
        entries = [FolderEntry(uri=image, caption_uri=text if text in texts else None) for image, text in names]
    cuts = range(0, len(entries), rows_per_shard)
    return [FolderShard(entries=tuple(entries[cut : cut + rows_per_shard])) for cut in cuts]


def _entries_of_tables(images: list[str], tables: list[str], caption_column: str | None) -> list[FolderEntry]:
    captions: dict[str, str | None] = {}
    for table in tables:
        captions.update(_read_caption_table(table, caption_column))
    there = set(images)
    uris = sorted(there | captions.keys())
    return [FolderEntry(uri=uri, caption=captions.get(uri), missing=uri not in there) for uri in uris]


def _read_caption_table(uri: str, caption_column: str | None) -> dict[str, str | None]:
    """Captions by image URI; file names are relative to the caption table's folder."""
    folder = uri.rpartition("/")[0]
    captions = {}
    for number, line in enumerate(read_bytes(uri).decode("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            name = record["file_name"]
        except (ValueError, KeyError, TypeError):
            example = '{"file_name": "a.png", "text": "a cat"}'
            raise SourceError(f"{uri!r}, line {number} is not an object such as {example}.") from None
        captions[f"{folder}/{str(name).removeprefix('./')}"] = find_caption(record, caption_column)
    return captions
