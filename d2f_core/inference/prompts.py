"""Prompt files: parquet, jsonl or csv, on S3 or local, as one checked table."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.storage import read_bytes, write_bytes

PROMPT_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("negative_prompt", pa.string(), nullable=False),
        pa.field("seed", pa.int64()),
    ]
)
COLUMNS = tuple(PROMPT_SCHEMA.names)
SAMPLE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A sample_id becomes part of a file name."""


class PromptError(ValueError):
    """A prompt file that cannot be used: the file, the row, the rule and the fix."""


def read_prompts(uri: str) -> pa.Table:
    """All prompts of a file, in file order, as `PROMPT_SCHEMA`.

    The column `prompt` is required. Optional: `sample_id` (default: a hash of row number and prompt), `negative_prompt`
    (default: empty), `seed` (default: the job's). Other columns are left out.

    Raises:
        PromptError: no such file, another format, no `prompt` column, a bad value, or a repeated sample_id.
    """
    try:
        data = read_bytes(uri)
    except FileNotFoundError:
        raise PromptError(f"No prompt file at {uri!r}. Check the URI, or upload the file there first.") from None
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
        raise PromptError(f"{uri!r} cannot be read ({reason}). Check the URI and the credentials.") from None
    rows = _rows(uri, data)
    checked = [_check(uri, index, row) for index, row in enumerate(rows)]
    if not checked:
        raise PromptError(f"{uri!r} holds no rows. Write at least one prompt.")
    _refuse_duplicates(uri, [row["sample_id"] for row in checked])
    return pa.Table.from_pylist(checked, schema=PROMPT_SCHEMA)


def write_prompts(uri: str, prompts: Sequence[str]) -> None:
    """Write prompts as jsonl, one row each."""
    write_bytes(uri, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode())


def prompts_digest(table: pa.Table) -> str:
    """sha256 over the checked rows: equal for equal prompts, whatever the file format."""
    digest = hashlib.sha256()
    for row in table.to_pylist():
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _rows(uri: str, data: bytes) -> Iterable[Mapping[str, Any]]:
    suffix = uri.rsplit(".", 1)[-1].lower()
    if suffix == "parquet":
        return _parquet_rows(uri, data)
    if suffix not in ("jsonl", "csv"):
        raise PromptError(f"{uri!r} ends in {suffix!r}. A prompt file is .parquet, .jsonl or .csv.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{uri!r} is not UTF-8 ({error}). Save it as UTF-8.") from None
    return _jsonl_rows(uri, text) if suffix == "jsonl" else _csv_rows(uri, text)


def _require_prompt(uri: str, columns: Iterable[str]) -> None:
    found = list(columns)
    if "prompt" not in found:
        raise PromptError(
            f"{uri!r} has no column 'prompt'; its columns are {found}. Rename the one that holds the prompts "
            f"(also read: {', '.join(name for name in COLUMNS if name != 'prompt')})."
        )


def _parquet_rows(uri: str, data: bytes) -> list[dict[str, Any]]:
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
    except pa.ArrowInvalid as error:
        raise PromptError(f"{uri!r} is not a parquet file ({error}). Write it again.") from None
    _require_prompt(uri, file.schema_arrow.names)
    return file.read(columns=[name for name in COLUMNS if name in file.schema_arrow.names]).to_pylist()


def _csv_rows(uri: str, text: str) -> Iterable[Mapping[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    _require_prompt(uri, reader.fieldnames or [])
    try:
        # An empty field is no value, as the format cannot tell the two apart; an empty prompt is then refused.
        yield from ({name: value or None for name, value in row.items() if name in COLUMNS} for row in reader)
    except csv.Error as error:
        raise PromptError(f"{uri!r} is not CSV near line {reader.line_num} ({error}). Correct that line.") from None


def _jsonl_rows(uri: str, text: str) -> Iterable[Mapping[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
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


def _check(uri: str, index: int, row: Mapping[str, Any]) -> dict[str, Any]:
    where = f"{uri!r} row {index + 1}"
    for name in ("prompt", "negative_prompt", "sample_id"):
        value = row.get(name)
        if not isinstance(value, str) and (value is not None or name == "prompt"):
            raise PromptError(f"{where}: {name} is {value!r}. It must be text; correct or remove the row.")
    sample_id = row.get("sample_id") or hashlib.sha256(f"{index}\0{row['prompt']}".encode()).hexdigest()[:32]
    if not SAMPLE_ID.fullmatch(sample_id):
        raise PromptError(
            f"{where}: sample_id {sample_id!r} cannot be a file name. Use letters, digits, '.', '_', '-'; at most 128."
        )
    return {
        "sample_id": sample_id,
        "prompt": row["prompt"],
        "negative_prompt": row.get("negative_prompt") or "",
        "seed": _seed(where, row.get("seed")),
    }


def _seed(where: str, value: Any) -> int | None:
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, float) and value.is_integer():  # a column of integers with gaps, as pandas stores it
        value = int(value)
    try:
        seed = int(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else -1
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**63:
        raise PromptError(f"{where}: seed is {value!r}. It must be a whole number from 0 to 2**63 - 1, or absent.")
    return seed


def _refuse_duplicates(uri: str, sample_ids: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for row, name in enumerate(sample_ids, start=1):
        if name in first:
            raise PromptError(
                f"{uri!r}: sample_id {name!r} stands in rows {first[name]} and {row}. It names the image, so it must "
                "be unique: rename one, or leave the column out."
            )
        first[name] = row
