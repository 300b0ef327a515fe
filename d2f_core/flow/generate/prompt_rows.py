"""The rows of a prompt file in any of its formats, unchecked."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PROMPT_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("negative_prompt", pa.string(), nullable=False),
        # Null: the job's setting.
        pa.field("seed", pa.int64()),
        pa.field("steps", pa.int32()),
        pa.field("guidance", pa.float64()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
    ]
)
COLUMNS = tuple(PROMPT_SCHEMA.names)
BATCH_ROWS = 1024
FORMATS = ("parquet", "jsonl", "json", "csv", "tsv", "txt")


class PromptError(ValueError):
    """A prompt file cannot be used; the message gives the file, the row, the rule and the fix."""


def read_rows(uri: str, path: Path) -> Iterable[Mapping[str, Any]]:
    """The rows of the file at a local path, in order, with what they have of the columns of `PROMPT_SCHEMA`.

    Args:
        uri: what the file is called in messages; its end tells the format.

    Raises:
        PromptError: it has another format, no column `prompt`, or cannot be parsed.
    """
    suffix = uri.rsplit(".", 1)[-1].lower()
    if suffix not in FORMATS:
        raise PromptError(f"{uri!r} ends in {suffix!r}. A prompt file is one of .{', .'.join(FORMATS)}.")
    return _parquet_rows(uri, path) if suffix == "parquet" else _text_rows(uri, path, suffix)


def _text_rows(uri: str, path: Path, suffix: str) -> Iterator[Mapping[str, Any]]:
    # csv needs line ends untranslated; other lines end only at \n, because other line separators may occur in a text.
    with path.open(encoding="utf-8-sig", newline="" if suffix in ("csv", "tsv") else "\n") as file:
        try:
            if suffix in ("csv", "tsv"):
                yield from _csv_rows(uri, file, "\t" if suffix == "tsv" else ",")
            elif suffix == "txt":
                yield from ({"prompt": line.strip()} for line in file if line.strip())
            else:
                yield from (_jsonl_rows(uri, file) if suffix == "jsonl" else _json_rows(uri, file.read()))
        except UnicodeDecodeError as error:
            raise PromptError(f"{uri!r} is not UTF-8 ({error}). Save it as UTF-8.") from None


def _require_prompt(uri: str, columns: Iterable[str]) -> None:
    found = list(columns)
    if "prompt" not in found:
        raise PromptError(
            f"{uri!r} has no column 'prompt'; its columns are {found}. Rename the one that holds the prompts "
            f"(also read: {', '.join(name for name in COLUMNS if name != 'prompt')})."
        )


def _parquet_rows(uri: str, path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            _require_prompt(uri, file.schema_arrow.names)
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise PromptError(f"{uri!r} is not a parquet file ({error}). Write it again.") from None


def _csv_rows(uri: str, file: Iterable[str], delimiter: str) -> Iterator[Mapping[str, Any]]:
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        _require_prompt(uri, header)
        if twice := [name for name in COLUMNS if header.count(name) > 1]:
            raise PromptError(
                f"{uri!r} has {header.count(twice[0])} columns {twice[0]!r}. Rename or remove the others."
            )
        for number, row in enumerate(filter(None, reader), start=1):
            _check_fields(f"{uri!r} row {number}", row, header)
            yield {name: value for name, value in zip(header, row, strict=False) if name in COLUMNS}
    except csv.Error as error:
        raise PromptError(f"{uri!r} is not CSV near line {reader.line_num} ({error}). Correct that line.") from None


def _check_fields(where: str, row: list[str], header: list[str]) -> None:
    """Raise PromptError where a text was cut at its commas, or kept its quotes."""
    if len(row) > len(header):
        raise PromptError(
            f"{where} has {len(row)} fields, and the header {len(header)}. Put a prompt with commas in double quotes."
        )
    for value in row:
        if value.startswith(" ") and value.lstrip().startswith('"'):
            raise PromptError(f"{where}: a blank before a quote makes the quote part of the text {value!r}. Remove it.")


def _json_rows(uri: str, text: str) -> Iterator[Mapping[str, Any]]:
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PromptError(f"{uri!r} is not JSON ({error}). Write a list of objects or texts.") from None
    if not isinstance(rows, list):
        raise PromptError(f"{uri!r} holds a {type(rows).__name__}. Write a list of objects or texts.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict | str):
            raise PromptError(f"{uri!r} row {number} is a {type(row).__name__}. Write a list of objects or texts.")
        found = {"prompt": row} if isinstance(row, str) else row
        _require_prompt(f"{uri} row {number}", found)
        yield found


def _jsonl_rows(uri: str, file: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{uri!r} line {number} is not JSON ({error}). Write one object per line.") from None
        if not isinstance(row, dict):
            raise PromptError(f"{uri!r} line {number} holds a {type(row).__name__}. Write one object per line.")
        _require_prompt(f"{uri} line {number}", row)
        yield row
