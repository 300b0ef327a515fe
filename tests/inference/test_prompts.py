"""Prompt files of any format give one checked table, or an error that names file, row, rule and fix."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2f_core.inference.prompts import PROMPT_SCHEMA, PromptError, prompts_digest, read_prompts, write_prompts

ROWS: list[dict[str, Any]] = [
    {"prompt": "red apple, 'quoted'", "sample_id": "a-1", "negative_prompt": "blue", "seed": 7},
    {"prompt": "two\nlines", "sample_id": "b.2", "negative_prompt": "", "seed": None},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("name", ["p.parquet", "p.jsonl", "p.csv"])
def test_all_formats_give_the_same_rows(tmp_path: Path, name: str) -> None:
    table = read_prompts(write(tmp_path / name, ROWS))
    assert table.schema == PROMPT_SCHEMA and table.to_pylist() == ROWS
    assert prompts_digest(table) == prompts_digest(pa.Table.from_pylist(ROWS, schema=PROMPT_SCHEMA))


def test_a_missing_sample_id_is_made_from_row_and_prompt(tmp_path: Path) -> None:
    write_prompts(str(tmp_path / "p.jsonl"), ["cat", "dog", "cat"])
    first = read_prompts(str(tmp_path / "p.jsonl"))["sample_id"].to_pylist()
    write_prompts(str(tmp_path / "p.jsonl"), ["cat", "bird", "cat"])
    second = read_prompts(str(tmp_path / "p.jsonl"))["sample_id"].to_pylist()
    assert len(set(first)) == 3
    assert [one == other for one, other in zip(first, second, strict=True)] == [True, False, True]


def test_integers_that_pandas_stored_as_floats_are_seeds(tmp_path: Path) -> None:
    uri = write(tmp_path / "p.parquet", [{"prompt": "a", "seed": 3.0}, {"prompt": "b", "seed": float("nan")}])
    assert read_prompts(uri)["seed"].to_pylist() == [3, None]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("p.csv", [{"text": "a", "id": "1"}], r"no column 'prompt'; its columns are \['text', 'id'\]"),
        ("p.parquet", [{"caption": "a"}], r"no column 'prompt'; its columns are \['caption'\]"),
        ("p.jsonl", [{"prompt": "a"}, {"promt": "b"}], r"line 2' has no column 'prompt'; its columns are \['promt'\]"),
        ("p.jsonl", [{"prompt": 3}], r"row 1: prompt is 3\. It must be text"),
        ("p.csv", [{"prompt": None, "seed": 1}], r"row 1: prompt is None"),
        ("p.jsonl", [{"prompt": "a", "seed": -1}], r"row 1: seed is -1.*whole number"),
        ("p.csv", [{"prompt": "a", "seed": "x"}], r"row 1: seed is 'x'"),
        ("p.jsonl", [{"prompt": "a", "sample_id": "../b"}], r"sample_id '\.\./b' cannot be a file name"),
        ("p.jsonl", [{"prompt": "a", "sample_id": "x"}] * 2, r"'x' stands in rows 1 and 2.*unique"),
        ("p.jsonl", [], r"holds no rows"),
        ("p.txt", [{"prompt": "a"}], r"ends in 'txt'.*\.parquet, \.jsonl or \.csv"),
    ],
)
def test_a_bad_file_is_refused_with_the_place_and_the_rule(
    tmp_path: Path, name: str, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        read_prompts(write(tmp_path / name, rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\nnonsense', "line 2 is not JSON"),
        ("p.jsonl", b"[1]", "line 1 holds a list"),
        ("p.jsonl", b"\xff\xfe", "is not UTF-8"),
        ("p.parquet", b"PAR1 not really", "is not a parquet file"),
        ("p.csv", b"", r"no column 'prompt'; its columns are \[\]"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PromptError, match=message):
        read_prompts(str(tmp_path / name))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No prompt file at"):
        read_prompts(str(tmp_path / "none.csv"))
