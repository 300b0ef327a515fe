"""The samples that every source yields, and the shards that tasks read."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

SourceKind = Literal["folder", "webdataset", "parquet", "spair", "jsonl", "coco"]
"""The last three hold pairs of images with keypoints."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_IMAGE_SUFFIXES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jxl")
LATER_IMAGE_SUFFIXES = (
    *(".jfif", ".jpe", ".pjpeg", ".pjp", ".mpo"),  # JPEG by other names
    *(".apng", ".heif", ".hif", ".dib", ".jp2", ".j2k", ".tga", ".ppm", ".pgm", ".pnm", ".ico"),
)
"""Those that earlier releases did not list."""
ALL_IMAGE_SUFFIXES = IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES + LATER_IMAGE_SUFFIXES
"""Of pictures, whether they can be decoded or not: each is read by its content, or gets an entry in the ledger."""
COMPANION_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".psd", ".svg")
"""Of raw photos and drawings, from which a picture of the same name is usually made: they get an entry in the ledger
where it is missing."""
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip", ".7z", ".rar")
"""Of archives that are not read: each gets an entry in the ledger."""

CAPTION_TABLES = ("metadata.jsonl", "captions.jsonl")
"""Names of a folder's caption table."""

MAX_TEXT_BYTES = 2**20
"""Largest caption or JSON file that is read, in bytes; a larger one goes to the ledger unread."""


class SourceError(ValueError):
    """A source that cannot be read as asked, with the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image as stored in the source: undecoded and unchecked."""

    source_uri: str
    """Origin of the image: a file, `file#member` or `file#row=7`."""
    image: bytes | None
    caption: str | None
    problem: str | None = None
    """Why the source could not deliver the image; None if it did."""
    rows: int = 1
    """Number of samples that this one stands for: more than 1 where the rest of a file cannot be read. Of a tar
    they are an estimate."""


class Shard(Protocol):
    """A planned piece of a source, small enough for one task."""

    @property
    def num_rows(self) -> int | None:
        """Number of samples; None when that is known only after reading."""
        ...

    def read(self) -> Iterator[Sample]:
        """The shard's samples, always in the same order."""
        ...


def whole_text(text: str) -> str:
    """The text with lone surrogates replaced by U+FFFD: JSON can contain them, but UTF-8 cannot encode them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
