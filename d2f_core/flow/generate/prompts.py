"""Prompt files, on S3 or local, read and checked row by row, so that files may be of any size."""

import hashlib
import itertools
import json
import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.manifest import read_manifest
from d2f_core.data.table_reader import RowReader
from d2f_core.flow.generate.prompt_rows import PROMPT_SCHEMA, PromptError, read_rows
from d2f_core.storage import local_file, write_bytes

SAMPLE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Allowed sample_id, which becomes part of a file name."""
WHOLE = re.compile(r"[+-]?\d+\.0*")
MAX_STEPS, MAX_PIXELS = 10_000, 65_536
"""Most solver steps, and the most pixels along one side of an image."""


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
            yield from (_check(uri, index, row) for index, row in enumerate(read_rows(uri, path)))
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


def _check(uri: str, index: int, row: Mapping[str, Any]) -> dict[str, Any]:
    where = f"{uri!r} row {index + 1}"
    prompt, negative, sample_id = (
        _text(where, name, row.get(name)) for name in ("prompt", "negative_prompt", "sample_id")
    )
    if not prompt:  # one rule for all formats, as CSV cannot tell an empty text from a missing one
        raise PromptError(f"{where}: prompt is empty. Write one, or a blank (' ') for an image of no text.")
    sample_id = sample_id or hashlib.sha256(f"{index}\0{prompt}".encode()).hexdigest()[:32]
    if not SAMPLE_ID.fullmatch(sample_id):
        raise PromptError(
            f"{where}: sample_id {sample_id!r} cannot be a file name. Use letters, digits, '.', '_', '-'; at most 128."
        )
    return {
        "sample_id": sample_id,
        "prompt": prompt,
        "negative_prompt": negative,
        "seed": _whole(where, "seed", row.get("seed"), 0, 2**63 - 1),
        "steps": _whole(where, "steps", row.get("steps"), 1, MAX_STEPS),
        "guidance": _number(where, "guidance", row.get("guidance")),
        "height": _whole(where, "height", row.get("height"), 1, MAX_PIXELS),
        "width": _whole(where, "width", row.get("width"), 1, MAX_PIXELS),
    }


def _text(where: str, name: str, value: Any) -> str:
    """A text column's value, empty where it is absent; of `sample_id` whole numbers count as texts."""
    if _absent(value):
        return ""
    if name == "sample_id" and not isinstance(value, bool):
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        value = str(value) if isinstance(value, int) else value
    if not isinstance(value, str):
        raise PromptError(f"{where}: {name} is {value!r}. It must be text; correct or remove the row.")
    if "\0" in value:
        raise PromptError(f"{where}: {name} holds NUL characters, as in UTF-16. Save the file as UTF-8.")
    return value


def _absent(value: Any) -> bool:
    return value is None or value == "" or value != value


def _whole(where: str, name: str, value: Any, lowest: int, highest: int) -> int | None:
    if _absent(value):
        return None
    if isinstance(value, float) and value.is_integer():  # pandas stores a column of integers with gaps as floats
        value = int(value)
    if isinstance(value, str) and WHOLE.fullmatch(value.strip()):  # and writes them so to CSV
        value = value.strip().partition(".")[0]
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
