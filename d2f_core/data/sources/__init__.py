"""Captioned images as they lie around: a folder with caption files, webdataset tars, or parquet with image bytes.

A source is first planned, from its listing alone, into shards that tasks can read on their own; plan and order of the
samples are the same every time, which is what lets a job be resumed.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import ray.data

from d2f_core.data.manifest import canonical_json, manifest_exists, read_manifest
from d2f_core.data.sources.folder import CAPTION_TABLES, plan_folder
from d2f_core.data.sources.parquet import plan_parquet
from d2f_core.data.sources.sample import ALL_IMAGE_SUFFIXES, Sample, Shard, SourceError, SourceKind, whole_text
from d2f_core.data.sources.tar import plan_tars
from d2f_core.storage import filesystem, is_s3

__all__ = ["ImageSource", "Sample", "Shard", "SourceError", "SourcePlan", "plan_images", "read_images"]

MAX_READ_BLOCKS = 1000


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Where captioned images are, and how to read them."""

    uri: str = ""
    """A directory, or one .tar or .parquet file: s3://bucket/key or a local path."""
    kind: Literal["auto", "folder", "webdataset", "parquet"] = "auto"
    """What lies there; `auto` looks, and refuses a mixture."""
    image_column: str = "image"
    """Parquet column with the bytes of image files (or the `datasets` library's struct of bytes and path)."""
    caption_column: str | None = None
    """Column or JSON key of the captions; None: `caption`, or else `text`."""


@dataclass(frozen=True, kw_only=True)
class SourcePlan:
    """A source cut into shards."""

    kind: SourceKind
    shards: tuple[Shard, ...]
    digest: str
    """Changes when a file of the source is added, removed or replaced."""

    @property
    def num_rows(self) -> int | None:
        """Samples in the source; None when only reading tells."""
        rows = [shard.num_rows for shard in self.shards]
        return sum(count for count in rows if count is not None) if None not in rows else None


def plan_images(source: ImageSource, *, rows_per_shard: int = 256) -> SourcePlan:
    """List the source and cut it into shards of about `rows_per_shard` samples (a tar is always one shard).

    Raises:
        SourceError: nothing there, a mixture of kinds, or missing columns.
    """
    if not source.uri:
        raise SourceError("The source has no URI. Give --source.uri s3://bucket/key or a local path.")
    listing = _list_files(source.uri)
    kind = source.kind if source.kind != "auto" else _detect(source.uri, listing)
    content: Any = sorted((whole_text(uri), entry["size"], _version(entry)) for uri, entry in listing.items())
    files = list(listing)
    if kind == "parquet":
        if manifest_exists(source.uri):  # a table of ours: what its manifest does not name is no part of it
            manifest = read_manifest(source.uri)
            root = ("s3://" if is_s3(source.uri) else "") + filesystem(source.uri)[1]
            files, content = [f"{root}/{file.path}" for file in manifest.files], manifest.digest
        shards = plan_parquet(files, source.image_column, source.caption_column, rows_per_shard)
    elif kind == "webdataset":
        shards = plan_tars(files, source.caption_column)
    else:
        sizes = {uri: _size(entry) for uri, entry in listing.items()}
        shards = plan_folder(sizes, source.caption_column, rows_per_shard)
    if not shards:
        raise SourceError(f"{source.uri!r} holds nothing to read as {kind} ({_summary(listing)}). Check URI and kind.")
    columns = (source.image_column, source.caption_column)
    digest = hashlib.sha256(canonical_json([kind, columns, content])).hexdigest()
    return SourcePlan(kind=kind, shards=tuple(shards), digest=digest)


def read_images(source: ImageSource, *, rows_per_shard: int = 256) -> ray.data.Dataset:
    """The source as a dataset of `image` (bytes), `caption`, `source_uri` and `problem`, in no certain order.

    Raises:
        SourceError: see `plan_images`.
    """
    shards = plan_images(source, rows_per_shard=rows_per_shard).shards
    items = [{"shard": number} for number in range(len(shards))]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(shards), MAX_READ_BLOCKS))

    def read(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for sample in shards[row["shard"]].read():
            yield vars(sample)

    return dataset.flat_map(read)  # pyright: ignore[reportArgumentType] -- a generator is accepted


def _list_files(uri: str) -> dict[str, dict[str, Any]]:
    """Files under a URI, or the file that it is, with their properties; without hidden ones (".git", "._a.png")."""
    fs, path = filesystem(uri)
    prefix = "s3://" if is_s3(uri) else ""
    found = fs.find(path, detail=True)
    files = {}
    for name, entry in found.items():
        below = name.removeprefix(path).lstrip("/").split("/")
        if not any(part.startswith(".") for part in below):
            files[prefix + name] = entry
    return files


def _version(entry: dict[str, Any]) -> str:
    """What changes when a file is replaced: its hash on S3, its time of change on a disk."""
    return str(entry.get("ETag") or entry.get("mtime"))


def _size(entry: dict[str, Any]) -> int | None:
    """Bytes of a plain file; None for a device, a pipe or a link to one, whose reading may never end."""
    plain = entry["type"] == "file" or (entry.get("islink") and os.path.isfile(entry["name"]))
    return int(entry["size"]) if plain else None


def _detect(uri: str, listing: dict[str, dict[str, Any]]) -> SourceKind:
    names = list(listing)
    suffixes: dict[SourceKind, tuple[str, ...]] = {
        "folder": (*ALL_IMAGE_SUFFIXES, *CAPTION_TABLES),
        "webdataset": (".tar",),
        "parquet": (".parquet",),
    }
    found: list[SourceKind] = [
        kind for kind, ends in suffixes.items() if any(name.lower().endswith(ends) for name in names)
    ]
    if not found:
        raise SourceError(f"{uri!r} holds no images, no .tar and no .parquet ({_summary(listing)}). Check the URI.")
    if len(found) > 1:
        raise SourceError(
            f"{uri!r} is a mixture of {' and '.join(found)} ({_summary(listing)}). Say which to read: --source.kind "
            f"{found[0]}, or give the URI of one part."
        )
    return found[0]


def _summary(listing: dict[str, dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for name in listing:
        base = name.rsplit("/", 1)[-1]
        suffix = "." + base.rsplit(".", 1)[-1].lower() if "." in base else "without suffix"
        counts[suffix] = counts.get(suffix, 0) + 1
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items())) or "no files at all"
