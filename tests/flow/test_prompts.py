"""Prompt files of any format give one checked table, or an error that names file, row, rule and fix."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2f_core.flow.generate.prompts import (
    PROMPT_SCHEMA,
    PromptError,
    checked_rows,
    copy_prompts,
    scan_prompts,
    write_prompts,
)

NOTHING = {"seed": None, "steps": None, "guidance": None, "height": None, "width": None}
ROWS: list[dict[str, Any]] = [
    {"prompt": "red apple, 'quoted'", "sample_id": "a-1", "negative_prompt": "blue"}
    | {"seed": 7, "steps": 3, "guidance": 1.5, "height": 32, "width": 64},
    {"prompt": "two\nlines", "sample_id": "b.2", "negative_prompt": "", **NOTHING},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("name", ["p.parquet", "p.jsonl", "p.json", "p.csv", "p.tsv"])
def test_all_formats_give_the_same_rows(tmp_path: Path, name: str) -> None:
    uri = write(tmp_path / name, ROWS)
    assert list(checked_rows(uri)) == ROWS
    found = scan_prompts(uri)
    assert (found.num_rows, found.rows_with_steps, found.sizes) == (2, 1, ((1, 32, 64), (2, None, None)))
    assert found.digest == scan_prompts(write(tmp_path / "same.parquet", ROWS)).digest


def test_a_copy_has_a_row_group_for_each_chunk(tmp_path: Path) -> None:
    found = scan_prompts(write(tmp_path / "p.jsonl", ROWS))
    copy_prompts(found, tmp_path / "copy.parquet", 1)
    file = pq.ParquetFile(tmp_path / "copy.parquet")
    assert file.schema_arrow == PROMPT_SCHEMA and [file.read_row_group(n).to_pylist() for n in (0, 1)] == [
        [row] for row in ROWS
    ]


def test_a_file_that_changes_between_check_and_copy_is_refused(tmp_path: Path) -> None:
    found = scan_prompts(write(tmp_path / "p.jsonl", ROWS))
    write(tmp_path / "p.jsonl", ROWS[:1])
    with pytest.raises(PromptError, match="has changed since"):
        copy_prompts(found, tmp_path / "copy.parquet", 1)


def test_a_missing_sample_id_is_made_from_row_and_prompt(tmp_path: Path) -> None:
    write_prompts(str(tmp_path / "p.jsonl"), ["cat", "dog", "cat"])
    first = [row["sample_id"] for row in checked_rows(str(tmp_path / "p.jsonl"))]
    write_prompts(str(tmp_path / "p.jsonl"), ["cat", "bird", "cat"])
    second = [row["sample_id"] for row in checked_rows(str(tmp_path / "p.jsonl"))]
    assert len(set(first)) == 3
    assert [one == other for one, other in zip(first, second, strict=True)] == [True, False, True]


def test_integers_that_pandas_stored_as_floats_are_seeds(tmp_path: Path) -> None:
    uri = write(tmp_path / "p.parquet", [{"prompt": "a", "seed": 3.0}, {"prompt": "b", "seed": float("nan")}])
    assert [row["seed"] for row in checked_rows(uri)] == [3, None]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("p.csv", [{"text": "a", "id": "1"}], r"no column 'prompt'; its columns are \['text', 'id'\]"),
        ("p.parquet", [{"caption": "a"}], r"no column 'prompt'; its columns are \['caption'\]"),
        ("p.jsonl", [{"prompt": "a"}, {"promt": "b"}], r"line 2' has no column 'prompt'; its columns are \['promt'\]"),
        ("p.jsonl", [{"prompt": 3}], r"row 1: prompt is 3\. It must be text"),
        ("p.csv", [{"prompt": None, "seed": 1}], r"row 1: prompt is empty\. Write one, or a blank"),
        ("p.jsonl", [{"prompt": ""}], r"row 1: prompt is empty"),
        ("p.json", [{"prompt": None}], r"row 1: prompt is empty"),
        ("p.parquet", [{"prompt": "a"}, {"prompt": ""}], r"row 2: prompt is empty"),
        ("p.jsonl", [{"prompt": "a\0b"}], r"row 1: prompt holds NUL"),
        ("p.jsonl", [{"prompt": "a", "sample_id": True}], r"row 1: sample_id is True"),
        ("p.csv", [{"prompt": "a", "seed": "5.5"}], r"row 1: seed is '5\.5'"),
        ("p.jsonl", [{"prompt": "a", "seed": -1}], r"row 1: seed is -1.*whole number"),
        ("p.csv", [{"prompt": "a", "seed": "x"}], r"row 1: seed is 'x'"),
        ("p.jsonl", [{"prompt": "a", "steps": 0}], r"row 1: steps is 0.*from 1 to"),
        ("p.csv", [{"prompt": "a", "guidance": "inf"}], r"row 1: guidance is 'inf'.*finite"),
        ("p.jsonl", [{"prompt": "a", "height": 1e9}], r"row 1: height is 1000000000"),
        ("p.jsonl", [{"prompt": "a", "width": True}], r"row 1: width is True"),
        ("p.jsonl", [{"prompt": "a", "sample_id": "../b"}], r"sample_id '\.\./b' cannot be a file name"),
        ("p.jsonl", [{"prompt": "a", "sample_id": "x"}] * 2, r"'x' stands in rows 1 and 2.*unique"),
        ("p.jsonl", [], r"holds no rows"),
        ("p.xlsx", [{"prompt": "a"}], r"ends in 'xlsx'.*\.parquet, \.jsonl, \.json, \.csv, \.tsv, \.txt"),
    ],
)
def test_a_bad_file_is_refused_with_the_place_and_the_rule(
    tmp_path: Path, name: str, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        scan_prompts(write(tmp_path / name, rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\nnonsense', "line 2 is not JSON"),
        ("p.jsonl", b"[1]", "line 1 holds a list"),
        ("p.jsonl", b"\xff\xfe", "is not UTF-8"),
        ("p.parquet", b"PAR1 not really", "is not a parquet file"),
        ("p.csv", b"prompt,negative_prompt\na cat, on a mat, asleep\n", "row 1 has 3 fields, and the header 2"),
        ("p.csv", b'prompt,seed\na,1\n "b",2\n', "row 2: a blank before a quote"),
        ("p.csv", b"prompt,seed,prompt\na,1,b\n", "has 2 columns 'prompt'"),
        ("p.json", b'{"prompt": "a"}', "holds a dict. Write a list"),
        ("p.json", b'["a", 3]', "row 2 is a int. Write a list"),
        ("p.txt", "a cat".encode("utf-16-le"), "row 1: prompt holds NUL"),
        ("p.csv", b"", r"no column 'prompt'; its columns are \[\]"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PromptError, match=message):
        scan_prompts(str(tmp_path / name))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No prompt file at"):
        scan_prompts(str(tmp_path / "none.csv"))


def test_a_text_file_has_a_prompt_in_each_line_and_a_list_may_hold_texts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa cat, on a mat\r\n\n  a \u2028 dog\n".encode())
    (tmp_path / "p.json").write_text(json.dumps(["a cat, on a mat", "a \u2028 dog"]))
    assert list(checked_rows(str(tmp_path / "p.txt"))) == list(checked_rows(str(tmp_path / "p.json")))
    assert [row["prompt"] for row in checked_rows(str(tmp_path / "p.txt"))] == ["a cat, on a mat", "a \u2028 dog"]


def test_values_that_pandas_writes_are_read(tmp_path: Path) -> None:
    nothing = pa.array([float("nan"), float("nan")])
    kinds = {"prompt": pa.array(["a", "b"]).dictionary_encode(), "negative_prompt": nothing, "sample_id": [7, 8]}
    pq.write_table(pa.table(kinds), tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_text("prompt,sample_id,seed\na,7,5.0\nb,8,\n")
    for name, seed in (("p.parquet", None), ("p.csv", 5)):
        rows = list(checked_rows(str(tmp_path / name)))
        assert [(row["prompt"], row["negative_prompt"], row["sample_id"]) for row in rows] == [
            ("a", "", "7"),
            ("b", "", "8"),
        ]
        assert [row["seed"] for row in rows] == [seed, None]


def test_a_blank_asks_for_an_image_of_no_text(tmp_path: Path) -> None:
    for name in ("p.csv", "p.jsonl", "p.parquet"):
        assert [row["prompt"] for row in checked_rows(write(tmp_path / name, [{"prompt": " "}]))] == [" "]
