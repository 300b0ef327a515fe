"""What every source yields, and the piece of a source that one task reads."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

SourceKind = Literal["folder", "webdataset", "parquet"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_IMAGE_SUFFIXES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jxl")
"""Images that are not decoded. They are listed all the same, so that each ends in the ledger and none is lost."""
ALL_IMAGE_SUFFIXES = IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES

CAPTION_TABLES = ("metadata.jsonl", "captions.jsonl")
"""Of a folder."""

MAX_TEXT_BYTES = 2**20
"""Largest caption or JSON member that is read; what is larger goes to the ledger unread."""

CAPTION_COLUMNS = ("caption", "text")
"""Names tried, in this order, when none is given."""


class SourceError(ValueError):
    """A source that cannot be read as asked, with the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image as it lies in the source: not decoded, perhaps bad."""

    source_uri: str
    """Where it came from: a file, or `file#member`, `file#row=7`."""
    image: bytes | None
    caption: str | None
    problem: str | None = None
    """Why the source itself could not deliver it."""
    rows: int = 1
    """Samples that it stands for, where the rest of a parquet file's piece is lost with one reason."""


class Shard(Protocol):
    """A planned piece of a source, small enough for one task."""

    @property
    def num_rows(self) -> int | None:
        """Samples in it; None when only reading tells."""
        ...

    def read(self) -> Iterator[Sample]:
        """Its samples, always in the same order."""
        ...


def whole_text(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs: JSON can name them, and no table can hold them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def find_caption(record: Mapping[str, Any], column: str | None) -> str | None:
    """The caption in a JSON record, or None."""
    for name in (column,) if column else CAPTION_COLUMNS:
        if isinstance(value := record.get(name), str):
            return whole_text(value)
    return None
