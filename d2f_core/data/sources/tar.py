"""Webdataset tars: consecutive members of one key are one sample, such as `0007.jpg` and `0007.txt` or `0007.json`."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from d2f_core.data.image_headers import MAX_IMAGE_BYTES
from d2f_core.data.sources.captions import CaptionError, CaptionRules, captioned, decode_text, find_captions
from d2f_core.data.sources.listing import Sizes
from d2f_core.data.sources.sample import ALL_IMAGE_SUFFIXES, MAX_TEXT_BYTES, PACKED_SUFFIXES, Sample
from d2f_core.data.sources.tar_archive import (
    DamagedArchiveError,
    Members,
    Sibling,
    read_tar,
    samples_in,
    scattered_keys,
    siblings,
)

TEXT_SUFFIXES, JSON_SUFFIX = (".txt", ".caption"), ".json"
NOTES = ("readme", "license", "licence", "copying", "notice", "authors", "changelog", "citation")
"""Names of texts about the data, which are no samples."""
CLIMBS = "bad_name: it climbs out of its folder"


@dataclass(frozen=True, kw_only=True)
class TarShard:
    """One tar, read sequentially and therefore by a single task."""

    uri: str
    rules: CaptionRules
    extensions: tuple[str, ...] = ()
    """Of the images; empty: all."""
    sibling: Sibling | None = None

    @property
    def num_rows(self) -> None:
        return None

    def read(self) -> Iterator[Sample]:
        scattered: dict[str, int] | None = None
        try:
            for number, (key, members) in enumerate(read_tar(self.uri, self._most_bytes, self.sibling)):
                if self._is_note(key, members):
                    continue
                if self._is_part(members):
                    scattered = scattered_keys(self.uri) if scattered is None else scattered
                    if key in scattered:
                        if scattered[key] == number:
                            yield self._unusable(key, f"unsorted: members of {key} lie apart. Sort the tar by names")
                        continue
                yield from self._samples(key, members)
        except DamagedArchiveError as error:
            yield Sample(source_uri=self.uri, image=None, caption=None, problem=str(error), rows=error.rows)

    def _most_bytes(self, extension: str) -> int | None:
        if extension in self._images:
            return MAX_IMAGE_BYTES
        text = extension in TEXT_SUFFIXES or extension == JSON_SUFFIX
        return MAX_TEXT_BYTES if text and self.rules.read else None

    @property
    def _images(self) -> tuple[str, ...]:
        return self.extensions or ALL_IMAGE_SUFFIXES

    def _is_part(self, members: Members) -> bool:
        """Whether an image or a caption is missing, which may stand elsewhere in the tar."""
        has_text = not self.rules.read or any(name in members for name in (*TEXT_SUFFIXES, JSON_SUFFIX))
        return not (has_text and any(name in members for name in self._images))

    def _is_note(self, key: str, members: Members) -> bool:
        """Whether a member is a text about the data."""
        return key.rpartition("/")[2].lower() in NOTES and not any(name in members for name in self._images)

    def _unusable(self, key: str, problem: str, rows: int = 1) -> Sample:
        return Sample(source_uri=f"{self.uri}#{key}", image=None, caption=None, problem=problem, rows=rows)

    def _samples(self, key: str, members: Members) -> Iterator[Sample]:
        found = [name for name in self._images if name in members]
        if not found:
            yield self._without_image(key, members)
            return
        if len(found) > 1 and not self.extensions:
            what = f"several_images: {' and '.join(found)} under this key"
            yield self._unusable(key, f"{what}. Give --source.image-extension {found[0][1:]}")
            return
        image, place = members[found[0]], f"{key}{found[0]}"
        if climbs(key) or isinstance(image, str):
            yield self._unusable(place, CLIMBS if climbs(key) else str(image))
            return
        yield from captioned(f"{self.uri}#{place}", image, partial(_captions, members, self.rules.column), self.rules)

    def _without_image(self, key: str, members: Members) -> Sample:
        there = ", ".join(sorted(members))
        dotted = {name.rpartition(".")[0] for name in members if name.count(".") > 1 and name.endswith(self._images)}
        rows = [name for name in dotted if re.search(r"\d", name) or f"{name}.txt" in members]
        if climbs(key):
            return self._unusable(key, CLIMBS)
        if rows:
            problem = f"dots_in_name: {there[:200]} under the key {key}, which ends at a name's first dot. Rename them"
            return self._unusable(key, problem, len(rows))
        return self._unusable(key, f"no_image: only {there} under this key")


@dataclass(frozen=True, kw_only=True)
class PackedShard:
    """An archive that is not read."""

    uri: str
    size: int
    num_rows: int | None
    """Samples in it, estimated; None: by the tar beside it."""
    sibling: Sibling | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of its entry in the ledger."""
        return (self.uri,)

    def read(self) -> Iterator[Sample]:
        problem = "packed: archives of this kind are not read. Unpack it, or say which files to read: --source.kind"
        rows = samples_in(self.size, self.sibling) if self.num_rows is None else self.num_rows
        yield Sample(source_uri=self.uri, image=None, caption=None, problem=problem, rows=rows)


def plan_packed(sizes: Sizes) -> list[PackedShard]:
    """The archives among the files that are not read, sorted by name."""
    sibling = siblings({uri: size for uri, size in sizes.items() if is_tar(uri)} | {"": None})[""]
    images = [size for uri, size in sizes.items() if size and uri.lower().endswith(ALL_IMAGE_SUFFIXES)]
    per_image = sum(images) / len(images) if images else 0
    shards = []
    for uri in sorted(uri for uri in sizes if uri.lower().endswith(PACKED_SUFFIXES)):
        size = sizes[uri] or 0
        rows = max(1, round(size / per_image)) if per_image else None if sibling else 1
        shards.append(PackedShard(uri=uri, size=size, num_rows=rows, sibling=sibling))
    return shards


def is_tar(uri: str) -> bool:
    return uri.lower().endswith(".tar")


def plan_tars(sizes: Sizes, rules: CaptionRules, extensions: tuple[str, ...] = ()) -> list[TarShard]:
    """One shard per tar among the files, sorted by name.

    Args:
        extensions: of the images; empty: all.
    """
    found = siblings({uri: size for uri, size in sizes.items() if is_tar(uri)})
    return [TarShard(uri=uri, rules=rules, extensions=extensions, sibling=found[uri]) for uri in sorted(found)]


def climbs(key: str) -> bool:
    """Whether a member's name points outside its folder (path traversal)."""
    return ".." in key.split("/")


def _captions(members: Members, column: str | None) -> Sequence[str]:
    """Captions from the text member, or from the JSON member if there is no text or a column was given."""
    names = (JSON_SUFFIX,) if column else (*TEXT_SUFFIXES, JSON_SUFFIX)
    name = next((name for name in names if name in members), None)
    if name is None:
        return []
    contents = members[name]
    if isinstance(contents, str):
        raise CaptionError(f"bad_caption: {contents}")
    return [decode_text(contents)] if name in TEXT_SUFFIXES else json_captions(contents, column)


def json_captions(contents: bytes, column: str | None) -> list[str]:
    """The captions in a JSON file about one image; empty where there are none, or where it is no JSON object."""
    try:
        record = json.loads(decode_text(contents).removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CaptionError):
            raise
        return []
    return find_captions(record, column) if isinstance(record, dict) else []
