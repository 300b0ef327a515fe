"""Tables of captions in a folder of images: JSON lines, CSV, parquet, or one JSON file of all."""

import csv
import io
import json
import logging
import posixpath
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.sources.captions import CAPTION_COLUMNS, find_captions
from d2f_core.data.sources.config import SPLITS
from d2f_core.data.sources.files import split_of
from d2f_core.data.sources.sample import ALL_IMAGE_SUFFIXES, CAPTION_TABLES, SourceError
from d2f_core.storage import read_bytes

logger = logging.getLogger(__name__)

OTHER_TABLES = re.compile(r"(metadata|captions)\.(csv|json)|metadata\.parquet|meta_[^/]*\.json")
"""Names of those that are read where there is neither a table of `CAPTION_TABLES` nor a text beside an image."""
NAME_COLUMNS = ("file_name", "filename", "path")
"""Columns with the image's name, of CSV and parquet."""
TAGS = "tags"
"""Key that is read where a JSON file of all captions has no other."""

Told = Iterator[tuple[str, list[str], str]]
"""An image's name, its captions, and where in the table they stand."""


def is_caption_table(uri: str) -> bool:
    return uri.rpartition("/")[2] in CAPTION_TABLES


def is_other_table(uri: str) -> bool:
    return bool(OTHER_TABLES.fullmatch(uri.rpartition("/")[2].lower()))


def read_table(uri: str, column: str | None) -> Told:
    """What a table says; nothing, and a warning, when it is one of something else.

    Args:
        column: of the captions; None: the usual ones.

    Raises:
        SourceError: it is damaged; names the place.
    """
    if uri.endswith(".jsonl"):
        return _json_lines(uri, column)
    suffix = uri.lower().rpartition(".")[2]
    rows = {"csv": _csv_rows, "parquet": _parquet_rows, "json": _json_rows}[suffix](uri)
    return _of_rows(uri, rows, (column,) if column else (*CAPTION_COLUMNS, *([TAGS] if suffix == "json" else [])))


def _json_lines(uri: str, column: str | None) -> Told:
    # Not `splitlines`, which also cuts at U+2028 and others that JSON lets stand in a caption.
    for number, line in enumerate(re.split("\r\n|\r|\n", _text(uri)), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            name = record["file_name"]
        except (ValueError, KeyError, TypeError, RecursionError):
            example = '{"file_name": "a.png", "text": "a cat"}'
            raise SourceError(f"{uri!r}, line {number} is not an object such as {example}.") from None
        yield str(name), find_captions(record, column), f"line {number}"


def _text(uri: str) -> str:
    try:
        return read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{uri!r} is not UTF-8 ({error}). Save it as UTF-8.") from None


def _of_rows(uri: str, rows: Iterator[tuple[str, Mapping[str, Any]]], columns: tuple[str, ...]) -> Told:
    for place, row in rows:
        name = next((row[key] for key in NAME_COLUMNS if isinstance(row.get(key), str)), None)
        if name is None:
            logger.warning("%s is no table of captions: %s has none of %s", uri, place, ", ".join(NAME_COLUMNS))
            return
        yield name, next((found for key in columns if (found := find_captions(row, key))), []), place


def _csv_rows(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(_text(uri), newline=""), strict=True)
    try:
        header = next(reader, [])
        for number, row in enumerate(filter(None, reader), start=1):
            if len(row) > len(header):
                raise SourceError(
                    f"{uri!r}, row {number} has {len(row)} fields, and the header {len(header)}. Put a caption with "
                    "commas in double quotes."
                )
            yield f"row {number}", dict(zip(header, row, strict=False))
    except csv.Error as error:
        raise SourceError(f"{uri!r} is not CSV near line {reader.line_num} ({error}). Correct that line.") from None


def _parquet_rows(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(uri)))
    except pa.ArrowInvalid as error:
        raise SourceError(f"{uri!r} is not a parquet file ({error}). Replace or remove it.") from None
    for batch in table.to_batches(max_chunksize=1000):
        yield from (("a row", row) for row in batch.to_pylist())


def _json_rows(uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a list of objects, or of `{name: {"caption": text}}` or `{name: text}`, as kohya's scripts write them."""
    try:
        content = json.loads(_text(uri))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{uri!r} is not JSON ({error}). Correct or remove it.") from None
    if isinstance(content, list):
        yield from ((f"entry {number}", row) for number, row in enumerate(content) if isinstance(row, dict))
    elif isinstance(content, dict):
        for name, value in content.items():
            row = value if isinstance(value, dict) else {CAPTION_COLUMNS[0]: value}
            yield f"entry {name!r}", {**row, NAME_COLUMNS[0]: name}


class ImageNames:
    """Finds a folder's images by the names that tables give them."""

    def __init__(self, files: Collection[str], images: Collection[str], split: str | None = None) -> None:
        self._files, self._images, self._split = set(files), set(images), split

    @cached_property
    def _by_form(self) -> dict[str, str]:
        """Files by their names in Unicode's composed form: macOS writes the decomposed one."""
        return {unicodedata.normalize("NFC", file): file for file in self._files}

    @cached_property
    def _by_stem(self) -> dict[str, str]:
        """Images by their names without extension, as far as these are unambiguous."""
        found: dict[str, str] = {}
        for image in self._images:
            stem = unicodedata.normalize("NFC", image.rpartition(".")[0])
            found[stem] = "" if stem in found else image
        return found

    def find(self, folder: str, name: str) -> str:
        """The file's URI; for a name that is none's, the one that it would have."""
        told = f"{folder}/{name.removeprefix('./')}"
        if told in self._files:
            return told
        # Only files that were listed are ever read, so that a name may climb and still lead nowhere else.
        slashed = unicodedata.normalize("NFC", name.replace("\\", "/"))
        place = slashed if slashed.startswith(("/", "s3://")) else _joined(folder, slashed)
        return self._by_form.get(place) or self._by_stem.get(place) or told

    def is_wanted(self, folder: str, uri: str) -> bool:
        """Whether a file that a table tells of is one of the images, or missing; not if it is of another split."""
        if uri in self._files:
            # Without a known extension, a file may be an image all the same, unless images are those of some.
            return uri in self._images or not uri.lower().endswith(ALL_IMAGE_SUFFIXES)
        named = split_of(uri.removeprefix(f"{folder}/"), by_file=False)
        return self._split not in SPLITS or named in (self._split, None)


def _joined(folder: str, name: str) -> str:
    scheme = "s3://" if folder.startswith("s3://") else ""
    path = posixpath.normpath(f"{unicodedata.normalize('NFC', folder).removeprefix(scheme)}/{name}")
    return scheme + path
