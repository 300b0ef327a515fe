"""The files at a source's URI, and their plan of shards."""

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from d2f_core.data.image_headers import too_large
from d2f_core.data.manifest import manifest_exists, read_manifest
from d2f_core.data.sources.config import ALL_SPLITS
from d2f_core.data.sources.files import Listing, list_files, of_split
from d2f_core.data.sources.sample import (
    ALL_IMAGE_SUFFIXES,
    CAPTION_TABLES,
    COMPANION_SUFFIXES,
    PACKED_SUFFIXES,
    Shard,
    SourceError,
    SourceKind,
    whole_text,
)
from d2f_core.identity import canonical_json
from d2f_core.storage import filesystem, is_s3

SUFFIXES: dict[SourceKind, tuple[str, ...]] = {
    "folder": (*ALL_IMAGE_SUFFIXES, *CAPTION_TABLES),
    "webdataset": (".tar",),
    "parquet": (".parquet",),
}
"""File name endings by which each kind of source is detected."""

Sizes = Mapping[str, int | None]
"""Bytes of the files by URI; None for a device, a pipe or a link to one, whose reading may never end."""


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """A source cut into shards."""

    kind: SourceKind
    shards: tuple[Shard, ...]
    digest: str
    """Changes when a file of the source is added, removed or replaced."""

    @property
    def num_rows(self) -> int | None:
        """Samples in the source; None when that is known only after reading."""
        rows = [shard.num_rows for shard in self.shards]
        return sum(count for count in rows if count is not None) if None not in rows else None

    @property
    def names(self) -> set[str] | None:
        """Places of the samples; None when they are known only after reading."""
        found: list[Collection[str] | None] = [getattr(shard, "names", None) for shard in self.shards]
        return {name for names in found for name in names or ()} if None not in found else None


def plan_source(
    uri: str,
    kind: str,
    columns: Collection[Any],
    cut: Callable[[SourceKind, Sizes], Collection[Shard]],
    detect: Callable[[str, Listing], SourceKind] | None = None,
    *,
    split: str | None = ALL_SPLITS,
    newly_listed: Callable[[Collection[str]], bool] = lambda _: False,
) -> SourcePlan:
    """List the files at a URI and split them into shards.

    Args:
        kind: layout of the source, or `auto` to detect it.
        columns: names of the columns that are read; part of the digest.
        cut: function that makes the shards from the files. Of this project's tables it gets only the files in the
            manifest.
        detect: function of the URI and its files that tells the layout; None: one of images.
        split: the part that is read, as `ImageSource.split` says it. This project's tables are read whole.
        newly_listed: function of the files that tells whether earlier releases left some of them out in silence: a job
            begun without them is another.

    Raises:
        SourceError: the source is empty, cannot be listed, or mixes layouts or splits; or raised by `cut`.
    """
    if not uri:
        raise SourceError("The source has no URI. Give --source.uri s3://bucket/key or a local path.")
    listing: Listing = list_files(uri)
    told: SourceKind = kind  # pyright: ignore[reportAssignmentType]
    found = (detect or _detect)(uri, listing) if kind == "auto" else told
    table = found == "parquet" and manifest_exists(uri)
    if not table:
        listing = of_split(uri, listing, split, by_file=found != "folder")
    content: Any = sorted((whole_text(file), entry["size"], _version(entry)) for file, entry in listing.items())
    if newly_listed(listing):
        content.append(["newly listed"])
    sizes = {file: _size(entry) for file, entry in listing.items()}
    if table:  # only files in the manifest belong to a table of this project
        manifest = read_manifest(uri)
        root = ("s3://" if is_s3(uri) else "") + filesystem(uri)[1]
        sizes, content = {f"{root}/{file.path}": file.size for file in manifest.files}, manifest.digest
    shards = cut(found, sizes)
    if not shards:
        raise SourceError(f"{uri!r} holds nothing to read as {found} ({summary(listing)}). Check URI and kind.")
    digest = hashlib.sha256(canonical_json([found, columns, content])).hexdigest()
    return SourcePlan(kind=found, shards=tuple(shards), digest=digest)


def _version(entry: Mapping[str, Any]) -> str:
    """A value that changes when a file is replaced: its hash on S3, its modification time on a disk."""
    return str(entry.get("ETag") or entry.get("mtime"))


def _size(entry: Mapping[str, Any]) -> int | None:
    plain = entry["type"] == "file" or (entry.get("islink") and os.path.isfile(entry["name"]))
    return int(entry["size"]) if plain else None


def file_problem(code: str, uri: str, sizes: Sizes, most: int) -> str | None:
    """Why a file is not read, as the ledger's reason; None when it can be.

    Args:
        code: of the reason.
        most: bytes.
    """
    if uri not in sizes:
        return f"{code}: the file is not there"
    size = sizes[uri]
    if size is None:
        return f"{code}: {uri.rpartition('/')[2]} is no plain file"
    return too_large(size, most) if size > most else None


def _detect(uri: str, listing: Listing) -> SourceKind:
    images = any(name.lower().endswith(ALL_IMAGE_SUFFIXES) for name in listing)
    # Beside images, `metadata.parquet` is a table of captions.
    names = [name for name in listing if not (images and name.rpartition("/")[2] == "metadata.parquet")]
    found: list[SourceKind] = [
        kind for kind, ends in SUFFIXES.items() if any(name.lower().endswith(ends) for name in names)
    ]
    if not found and any(name.lower().endswith(COMPANION_SUFFIXES) for name in names):
        return "folder"
    if not found:
        packed = any(name.lower().endswith(PACKED_SUFFIXES) for name in names)
        fix = "Unpack the archives." if packed else "Check the URI."
        raise SourceError(f"{uri!r} holds no images, no .tar and no .parquet ({summary(listing)}). {fix}")
    if len(found) > 1:
        raise SourceError(
            f"{uri!r} is a mixture of {' and '.join(found)} ({summary(listing)}). Say which to read: --source.kind "
            f"{found[0]}, or give the URI of one part."
        )
    return found[0]


def summary(listing: Listing) -> str:
    """How many files there are of each suffix, in words."""
    counts: dict[str, int] = {}
    for name in listing:
        base = name.rsplit("/", 1)[-1]
        suffix = "." + base.rsplit(".", 1)[-1].lower() if "." in base else "without suffix"
        counts[suffix] = counts.get(suffix, 0) + 1
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items())) or "no files at all"
