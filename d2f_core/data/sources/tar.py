"""Webdataset tars: consecutive members of one key are one sample, such as `0007.jpg` and `0007.txt` or `0007.json`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from d2f_core.data.image_headers import MAX_IMAGE_BYTES
from d2f_core.data.sources.listing import Sizes
from d2f_core.data.sources.sample import ALL_IMAGE_SUFFIXES, MAX_TEXT_BYTES, Sample, find_caption
from d2f_core.data.sources.tar_archive import DamagedArchiveError, Members, Sibling, read_tar, siblings

TEXT_SUFFIXES, JSON_SUFFIX = (".txt", ".caption"), ".json"
CLIMBS = "bad_name: it climbs out of its folder"


@dataclass(frozen=True, kw_only=True)
class TarShard:
    """One tar, read sequentially and therefore by a single task."""

    uri: str
    caption_column: str | None = None
    captions: bool = True
    sibling: Sibling | None = None

    @property
    def num_rows(self) -> None:
        return None

    def read(self) -> Iterator[Sample]:
        try:
            limit = _most_bytes if self.captions else _most_bytes_of_images
            for key, members in read_tar(self.uri, limit, self.sibling):
                yield _sample(self, key, members)
        except DamagedArchiveError as error:
            yield Sample(source_uri=self.uri, image=None, caption=None, problem=str(error), rows=error.rows)


def plan_tars(sizes: Sizes, caption_column: str | None, *, captions: bool = True) -> list[TarShard]:
    """One shard per tar among the files, sorted by name."""
    found = siblings({uri: size for uri, size in sizes.items() if uri.endswith(".tar")})
    return [
        TarShard(uri=uri, caption_column=caption_column, captions=captions, sibling=found[uri]) for uri in sorted(found)
    ]


def climbs(key: str) -> bool:
    """Whether a member's name points outside its folder (path traversal)."""
    return ".." in key.split("/")


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
