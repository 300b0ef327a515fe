"""Prompt files: parquet, jsonl or csv, on S3 or local, read and checked row by row, so that files may be of any
size.
"""

import csv
import hashlib
import itertools
import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.manifest import read_manifest
from d2f_core.data.table_reader import RowReader
from d2f_core.storage import local_file, write_bytes

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
SAMPLE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Allowed sample_id, which becomes part of a file name."""
BATCH_ROWS = 1024
MAX_STEPS, MAX_PIXELS = 10_000, 65_536
"""Most solver steps, and the most pixels along one side of an image."""


class PromptError(ValueError):
    """A prompt file cannot be used; the message gives the file, the row, the rule and the fix."""


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """Summary of a prompt file, without its rows."""

    uri: str
    num_rows: int
    digest: str
    """sha256 over the checked rows: equal for equal prompts, whatever the file format."""
    rows_with_steps: int
    """Number of rows with their own number of steps."""
    sizes: tuple[tuple[int, int | None, int | None], ...]
    """(row, height, width) for each distinct size of a row, with the number of the first row that has it."""


def scan_prompts(uri: str) -> PromptFile:
    """Read and check every row of a prompt file; keeps 8 bytes per row in memory.

    The column `prompt` is required. Optional: `sample_id` (default: a hash of row number and prompt), `negative_prompt`
    (default: empty), and, overriding the job's settings: `seed`, `steps`, `guidance`, `height`, `width` (pixels). Other
    columns are ignored.

    Raises:
        PromptError: the file does not exist, has another format or no `prompt` column, or holds a bad value or a
            repeated sample_id.
    """
    digest, names, sizes, with_steps = hashlib.sha256(), array("Q"), dict[Any, int](), 0
    for number, row in enumerate(checked_rows(uri), start=1):
        digest.update(_line(row))
        names.append(_short_hash(row["sample_id"]))
        sizes.setdefault((row["height"], row["width"]), number)
        with_steps += row["steps"] is not None
    if not names:
        raise PromptError(f"{uri!r} holds no rows. Write at least one prompt.")
    hashes, counts = np.unique(np.frombuffer(names, np.uint64), return_counts=True)
    if (counts > 1).any():
        _refuse_duplicates(uri, set(hashes[counts > 1].tolist()))
    return PromptFile(
        uri=uri,
        num_rows=len(names),
        digest=digest.hexdigest(),
        rows_with_steps=with_steps,
        sizes=tuple((number, *size) for size, number in sizes.items()),
    )


def checked_rows(uri: str) -> Iterator[dict[str, Any]]:
    """The rows of a prompt file by the columns of `PROMPT_SCHEMA`, in file order.

    Raises:
        PromptError: as for `scan_prompts`, except that repeated sample_ids are not detected.
    """
    try:
        with local_file(uri) as path:
            yield from (_check(uri, index, row) for index, row in enumerate(_rows(uri, path)))
    except FileNotFoundError:
        raise PromptError(f"No prompt file at {uri!r}. Check the URI, or upload the file there first.") from None
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
        raise PromptError(f"{uri!r} cannot be read ({reason}). Check the URI and the credentials.") from None


def copy_prompts(prompts: PromptFile, target: Path, rows_per_group: int) -> None:
    """Write the checked rows to a local parquet file, one row group for each `rows_per_group` of them.

    Raises:
        PromptError: the file has changed since it was scanned.
    """
    rows, digest = checked_rows(prompts.uri), hashlib.sha256()
    with pq.ParquetWriter(target, PROMPT_SCHEMA) as writer:
        while group := list(itertools.islice(rows, rows_per_group)):
            for row in group:
                digest.update(_line(row))
            writer.write_table(pa.Table.from_pylist(group, schema=PROMPT_SCHEMA))
    if digest.hexdigest() != prompts.digest:
        raise PromptError(f"{prompts.uri!r} has changed since it was checked. Start again once it stays as it is.")


def table_captions(uri: str, most: int | None = None) -> list[str]:
    """The captions of an image or latent table in its order, at most `most` of them."""
    manifest = read_manifest(uri)
    rows = np.arange(manifest.num_rows if most is None else min(manifest.num_rows, most))
    return RowReader(uri, manifest, ("caption",)).read(rows).column("caption").to_pylist()


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=True).encode() + b"\n"


def write_prompts(uri: str, prompts: Sequence[str]) -> None:
    """Write prompts as a jsonl file, one row per prompt."""
    write_bytes(uri, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode())


def _short_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _rows(uri: str, path: Path) -> Iterable[Mapping[str, Any]]:
    suffix = uri.rsplit(".", 1)[-1].lower()
    if suffix == "parquet":
        return _parquet_rows(uri, path)
    if suffix not in ("jsonl", "csv"):
        raise PromptError(f"{uri!r} ends in {suffix!r}. A prompt file is .parquet, .jsonl or .csv.")
    return _text_rows(uri, path, suffix)


def _text_rows(uri: str, path: Path, suffix: str) -> Iterator[Mapping[str, Any]]:
    # csv needs line ends untranslated; JSON lines end only at \n, because other line separators may occur in a string.
    with path.open(encoding="utf-8-sig", newline="" if suffix == "csv" else "\n") as file:
        try:
            yield from (_jsonl_rows if suffix == "jsonl" else _csv_rows)(uri, file)
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


def _csv_rows(uri: str, file: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    reader = csv.DictReader(file, strict=True)
    try:
        _require_prompt(uri, reader.fieldnames or [])
        # An empty field counts as missing, as csv cannot tell the two apart; an empty prompt is then refused.
        yield from ({name: value or None for name, value in row.items() if name in COLUMNS} for row in reader)
    except csv.Error as error:
        raise PromptError(f"{uri!r} is not CSV near line {reader.line_num} ({error}). Correct that line.") from None


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
        "seed": _whole(where, "seed", row.get("seed"), 0, 2**63 - 1),
        "steps": _whole(where, "steps", row.get("steps"), 1, MAX_STEPS),
        "guidance": _number(where, "guidance", row.get("guidance")),
        "height": _whole(where, "height", row.get("height"), 1, MAX_PIXELS),
        "width": _whole(where, "width", row.get("width"), 1, MAX_PIXELS),
    }


def _absent(value: Any) -> bool:
    return value is None or value == "" or value != value


def _whole(where: str, name: str, value: Any, lowest: int, highest: int) -> int | None:
    if _absent(value):
        return None
    if isinstance(value, float) and value.is_integer():  # pandas stores a column of integers with gaps as floats
        value = int(value)
    try:
        number = int(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else lowest - 1
    except ValueError:
        number = lowest - 1
    if not lowest <= number <= highest:
        raise PromptError(
            f"{where}: {name} is {value!r}. It must be a whole number from {lowest} to {highest}, or absent."
        )
    return number


def _number(where: str, name: str, value: Any) -> float | None:
    if _absent(value):
        return None
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise PromptError(f"{where}: {name} is {value!r}. It must be a finite number, or absent.")
    return number


def _refuse_duplicates(uri: str, hashes: set[int]) -> None:
    """Raise PromptError with the repeated sample_id, unless the equal hashes are only a collision."""
    first: dict[str, int] = {}
    for number, row in enumerate(checked_rows(uri), start=1):
        name = row["sample_id"]
        if name in first:
            raise PromptError(
                f"{uri!r}: sample_id {name!r} stands in rows {first[name]} and {number}. It names the image, so it "
                "must be unique: rename one, or leave the column out."
            )
        if _short_hash(name) in hashes:
            first[name] = number
