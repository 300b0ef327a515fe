"""A folder of images, with a caption file beside each, or a table of captions per folder, such as `metadata.jsonl`."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

from d2f_core.data.image_headers import MAX_IMAGE_BYTES
from d2f_core.data.sources.caption_tables import ImageNames, is_caption_table, is_other_table, read_table
from d2f_core.data.sources.captions import CaptionRules, captioned, decode_text
from d2f_core.data.sources.listing import Sizes, file_problem
from d2f_core.data.sources.sample import (
    ALL_IMAGE_SUFFIXES,
    COMPANION_SUFFIXES,
    MAX_TEXT_BYTES,
    Sample,
    SourceError,
    whole_text,
)
from d2f_core.data.sources.tar import json_captions
from d2f_core.storage import read_bytes

logger = logging.getLogger(__name__)

READ_THREADS = 16
TEXT, CAPTION, JSON = ".txt", ".caption", ".json"


@dataclass(frozen=True, kw_only=True)
class FolderEntry:
    """One image and the place of its caption."""

    uri: str
    captions: tuple[str, ...] = ()
    """Captions from a caption table."""
    caption_uri: str | None = None
    """URI of the caption file beside the image."""
    problem: str | None = None
    """Why image or caption cannot be read; None when they can."""


@dataclass(frozen=True, kw_only=True)
class FolderShard:
    entries: tuple[FolderEntry, ...]
    rules: CaptionRules

    @property
    def num_rows(self) -> int | None:
        """Not known where each of several captions is a sample."""
        return None if self.rules.several == "all" else len(self.entries)

    @property
    def names(self) -> tuple[str, ...] | None:
        """Places of the samples; not known where each of several captions is one."""
        return None if self.rules.several == "all" else tuple(whole_text(entry.uri) for entry in self.entries)

    def read(self) -> Iterator[Sample]:
        with ThreadPoolExecutor(READ_THREADS) as pool:
            yield from chain.from_iterable(pool.map(self._read_entry, self.entries))

    def _read_entry(self, entry: FolderEntry) -> list[Sample]:
        name = whole_text(entry.uri)  # a disk's file names need not be UTF-8
        if entry.problem:
            return [Sample(source_uri=name, image=None, caption=None, problem=entry.problem)]

        def captions() -> Sequence[str]:
            if entry.caption_uri is None:
                return entry.captions
            content = read_bytes(entry.caption_uri)
            if entry.caption_uri.lower().endswith(JSON):
                return json_captions(content, self.rules.column)
            return [decode_text(content)]

        return list(captioned(name, read_bytes(entry.uri), captions, self.rules))


def plan_folder(
    sizes: Sizes,
    rules: CaptionRules,
    rows_per_shard: int,
    *,
    extensions: tuple[str, ...] = (),
    split: str | None = None,
) -> list[FolderShard]:
    """Split the images among the files, sorted by name, into shards.

    Args:
        sizes: bytes of each file by its URI; None for a device, a pipe or anything else that may never end.
        extensions: of the images; empty: all.
        split: to which the files belong; what a table tells of others is left out.

    Raises:
        SourceError: captions in both forms, two images of one caption file, several captions of one image and no rule
            which to take, or a caption table that cannot be read.
    """
    images = _images(sizes, extensions)
    texts = _texts(images, sizes, rules) if rules.read else {}
    tables = sorted(uri for uri in sizes if rules.read and is_caption_table(uri))
    beside = sorted(text for text in texts.values() if text.lower().endswith(TEXT))
    if tables and beside:
        raise SourceError(f"Captions both in {tables[0]!r} and in files such as {beside[0]!r}. Keep one of the two.")
    others = sorted(uri for uri in sizes if rules.read and is_other_table(uri))
    if others and (tables or any(not text.lower().endswith(JSON) for text in texts.values())):
        logger.warning("%s is not read: captions are in %s", others[0], tables[0] if tables else min(texts.values()))
        others = []
    names = ImageNames(sizes, images, split)
    found = _told_by_tables(names, tables or others, rules, sizes)
    if tables or found:
        uris = sorted({*images, *found})
        entries = [_entry(uri, None, tuple(found.get(uri, ())), sizes) for uri in uris]
    else:
        _refuse_shared(images, texts)
        entries = [_entry(image, texts.get(image), (), sizes) for image in images]
    cuts = range(0, len(entries), rows_per_shard)
    return [FolderShard(entries=tuple(entries[cut : cut + rows_per_shard]), rules=rules) for cut in cuts]


def _images(sizes: Sizes, extensions: tuple[str, ...]) -> list[str]:
    images = sorted(uri for uri in sizes if uri.lower().endswith(extensions or ALL_IMAGE_SUFFIXES))
    return images if extensions else sorted([*images, *lone_companions(sizes)])


def lone_companions(files: Collection[str]) -> list[str]:
    """Raw photos and drawings among the files from which no picture was made."""
    found = [uri for uri in files if uri.lower().endswith(COMPANION_SUFFIXES)]
    stems = {uri.rpartition(".")[0] for uri in files if uri.lower().endswith(ALL_IMAGE_SUFFIXES)} if found else set()
    return [uri for uri in found if uri.rpartition(".")[0] not in stems]


def _texts(images: list[str], sizes: Sizes, rules: CaptionRules) -> dict[str, str]:
    """The caption file beside each image that has one: `a.txt`, `a.caption`, `a.png.txt` or `a.json` of `a.png`."""
    known = {uri for uri in sizes if uri.lower().endswith((TEXT, CAPTION, JSON))}
    # Sorted so that, of names that differ in case alone, the one in lower case counts.
    by_name = {_lower_suffix(uri): uri for uri in sorted(known)}
    forms = [TEXT, CAPTION, JSON]
    if rules.column:  # which only JSON has
        forms = [JSON, TEXT, CAPTION]
    found = {}
    for image in images:
        stem = image.rpartition(".")[0]
        places = (base + form for form in forms for base in (stem, image))
        if text := next((by_name[place] for place in places if place in by_name), None):
            found[image] = text
    return found


def _lower_suffix(uri: str) -> str:
    stem, dot, suffix = uri.rpartition(".")
    return stem + dot + suffix.lower()


def _refuse_shared(images: list[str], texts: Mapping[str, str]) -> None:
    """Raise SourceError when one caption file stands beside two images, of which one may be a mask."""
    owners: dict[str, str] = {}
    for image in images:
        text = texts.get(image)
        if text and text in owners:
            raise SourceError(
                f"{owners[text]!r} and {image!r} share the caption {text!r}. Say which is the image: "
                f"--source.image-extension {image.rpartition('.')[2]}"
            )
        if text:
            owners[text] = image


def _entry(image: str, text: str | None, captions: tuple[str, ...], sizes: Sizes) -> FolderEntry:
    problem = file_problem("no_image", image, sizes, MAX_IMAGE_BYTES)
    if text and not problem:
        problem = file_problem("bad_caption", text, sizes, MAX_TEXT_BYTES)
    return FolderEntry(uri=image, captions=captions, caption_uri=text, problem=problem)


def _told_by_tables(names: ImageNames, tables: list[str], rules: CaptionRules, sizes: Sizes) -> dict[str, list[str]]:
    """The captions of the tables by image URI."""
    found, places = dict[str, list[str]](), dict[str, str]()
    for table in tables:
        if sizes[table] is None:
            raise SourceError(f"{table!r} is no plain file. Replace it by one, or remove it.")
        folder = table.rpartition("/")[0]
        for name, captions, place in read_table(table, rules.column):
            uri = names.find(folder, name)
            if not names.is_wanted(folder, uri):
                continue
            before, place = found.setdefault(uri, []), f"{table!r}, {place}"
            new = [caption for caption in dict.fromkeys(captions) if caption not in before]
            if rules.several is None and len(before) + len(new) > 1:
                raise SourceError(
                    f"{uri!r} has several captions ({places.get(uri, place)}; {place}). Give --source.captions first, "
                    "or all for a sample each."
                )
            before += new
            places.setdefault(uri, place)
    return found
