"""Captions: several of one image, marks and encodings, and which names of a table are which files."""

import json
from pathlib import Path

import pytest

from d2f_core.data.sources.captions import CaptionRules, captioned, decode_text
from d2f_core.data.sources.config import ImageSource
from d2f_core.data.sources.images import plan_images
from d2f_core.data.sources.sample import Sample, SourceError
from tests.data.pictures import file_bytes, pictures, pixels, tar_bytes, write_folder


def samples_of(uri: Path, **how) -> list[Sample]:
    plan = plan_images(ImageSource(uri=str(uri), **how))
    samples = [sample for shard in plan.shards for sample in shard.read()]
    assert plan.num_rows in (None, len(samples))
    return samples


def told(**rules) -> list[tuple[str, str | None, str | None]]:
    found = rules.pop("found")
    samples = captioned("a", b"image", lambda: found, CaptionRules(**rules))
    return [(s.source_uri, s.caption, (s.problem or "").partition(":")[0] or None) for s in samples]


def test_of_several_captions_none_is_taken_in_silence() -> None:
    assert told(found=["x", "y"]) == [("a", None, "several_captions")]
    assert told(found=["x", "y"], several="first") == [("a", "x", None)]
    assert told(found=["x", "y"], several="all") == [("a#caption=0", "x", None), ("a#caption=1", "y", None)]
    assert told(found=["x", "x", " "]) == [("a", "x", None)]
    assert told(found=["x", "y"], read=False) == [("a", None, None)]


def test_a_default_is_for_images_without_a_caption_alone() -> None:
    assert told(found=[], default="d") == told(found=[" \n"], default="d") == [("a", "d", None)]
    assert told(found=["x"], default="d") == [("a", "x", None)]
    assert told(found=[""]) == [("a", "", None)]


def test_marks_are_no_part_of_a_caption_and_other_encodings_are_refused() -> None:
    assert told(found=[decode_text("\ufeffé".encode())]) == [("a", "é", None)]
    assert told(found=["a\0c\0a\0t\0"])[0][2] == "bad_caption"
    with pytest.raises(ValueError, match="bad_caption: UTF-16"):
        decode_text("a cat".encode("utf-16"))


@pytest.mark.parametrize("form", ["jsonl", "tar", "json"])
def test_every_caption_of_an_image_is_a_sample_of_its_own_if_asked_for(form: str, tmp_path: Path) -> None:
    image, texts = file_bytes(pixels(0)), ["one", "two"]
    if form == "tar":
        (tmp_path / "x.tar").write_bytes(tar_bytes({"a.png": image, "a.json": json.dumps({"text": texts}).encode()}))
    else:
        (tmp_path / "a.png").write_bytes(image)
        lines = [json.dumps({"file_name": "a.png", "text": text}) for text in texts]
        (tmp_path / ("metadata.jsonl" if form == "jsonl" else "a.json")).write_text(
            "\n".join(lines) if form == "jsonl" else json.dumps({"text": texts})
        )
    samples = samples_of(tmp_path, captions="all")
    assert [(s.image, s.caption) for s in samples] == [(image, text) for text in texts]
    assert [s.source_uri.partition("a.png")[2] for s in samples] == ["#caption=0", "#caption=1"]


def test_lines_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    write_folder(str(tmp_path), pictures(1), table="metadata.jsonl")
    with (tmp_path / "metadata.jsonl").open("a") as table:
        table.write('\n{"file_name": "./000.png", "text": "another"}')
    with pytest.raises(SourceError, match=r"several captions \(.*line 1; .*line 2\)\. Give --source\.captions first"):
        samples_of(tmp_path)


def test_a_row_of_csv_with_too_many_fields_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat, on a mat\n")
    with pytest.raises(SourceError, match=r"row 1 has 3 fields, and the header 2"):
        samples_of(tmp_path)


def test_a_table_of_something_else_takes_no_captions_away(tmp_path: Path) -> None:
    write_folder(str(tmp_path), pictures(2))
    (tmp_path / "metadata.csv").write_text("file_name,text\n000.png,other\n")
    assert [s.caption for s in samples_of(tmp_path)] == ["picture number 0", "picture number 1"]
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    (tmp_path / "metadata.csv").write_text("licence,url\nx,y\n")
    assert [s.caption for s in samples_of(tmp_path)] == [None, None]


def test_a_column_is_read_from_json_beside_a_text(tmp_path: Path) -> None:
    write_folder(str(tmp_path), pictures(1))
    (tmp_path / "000.json").write_text('{"alt": "long", "text": "short"}')
    assert [s.caption for s in samples_of(tmp_path)] == ["picture number 0"]
    assert [s.caption for s in samples_of(tmp_path, caption_column="alt")] == ["long"]


@pytest.mark.parametrize(
    "how", [{"captions": "some"}, {"split": "eval"}, {"default_caption": " "}, {"image_extension": ","}]
)
def test_settings_that_say_nothing_are_refused(how: dict[str, str]) -> None:
    with pytest.raises(SourceError, match=r"must be|is none of|is empty|names none"):
        ImageSource(**how)  # pyright: ignore[reportArgumentType]
