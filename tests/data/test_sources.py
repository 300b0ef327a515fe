"""Sources: the same pictures in any form are the same samples, in the same order, and nothing is lost."""

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2f_core.data.datasets.config import MakeDatasetConfig
from d2f_core.data.datasets.emoji import make_dataset
from d2f_core.data.schema import sample_id
from d2f_core.data.sources.config import ImageSource
from d2f_core.data.sources.images import plan_images
from d2f_core.data.sources.sample import SourceError
from d2f_core.data.sources.tar_archive import split_name
from d2f_core.storage import join, write_bytes
from tests.data.pictures import pictures, tar_bytes, write_folder, write_parquet, write_tars

WRITERS = {
    "folder-txt": write_folder,
    "folder-metadata": lambda uri, items: write_folder(uri, items, table="metadata.jsonl"),
    "folder-captions": lambda uri, items: write_folder(uri, items, table="captions.jsonl"),
    "tar-txt": write_tars,
    "tar-json": lambda uri, items: write_tars(uri, items, json_captions=True),
    "parquet-bytes": write_parquet,
    "parquet-struct": lambda uri, items: write_parquet(uri, items, struct=True),
}


def read_all(uri: str, rows_per_shard: int = 4, **how):
    plan = plan_images(ImageSource(uri=uri, **how), rows_per_shard=rows_per_shard)
    return [sample for shard in plan.shards for sample in shard.read()]


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_of_the_same_pictures_gives_the_same_samples_in_order(form, tmp_path):
    items = pictures(13)
    samples = read_all(WRITERS[form](str(tmp_path), items))
    assert [(sample.image, sample.caption) for sample in samples] == [(image, text) for _, image, text in items]
    assert len({sample.source_uri for sample in samples}) == len(items)


@pytest.mark.parametrize("form", ["folder-txt", "folder-metadata", "tar-json", "parquet-struct"])
def test_s3_is_read_like_a_disk(form, bucket, tmp_path):
    items = pictures(9)
    here, there = WRITERS[form](str(tmp_path), items), WRITERS[form](join(bucket, form), items)
    assert [(s.image, s.caption) for s in read_all(there)] == [(s.image, s.caption) for s in read_all(here)]
    assert all(sample.source_uri.startswith(there) for sample in read_all(there))


@pytest.mark.parametrize("form", [form for form in WRITERS if not form.startswith("tar")])
def test_shards_are_small_and_know_their_rows(form, tmp_path):
    plan = plan_images(ImageSource(uri=WRITERS[form](str(tmp_path), pictures(13))), rows_per_shard=5)
    assert plan.num_rows == 13
    assert all(len(list(shard.read())) == shard.num_rows <= 5 for shard in plan.shards)


def test_a_source_may_be_a_single_file(tmp_path):
    write_tars(str(tmp_path), pictures(4), per_tar=4)
    assert len(read_all(str(tmp_path / "shard-0000.tar"))) == 4


def test_an_image_table_is_read_by_its_manifest(tmp_path):
    uri = str(tmp_path / "emoji")
    make_dataset(MakeDatasetConfig(output=uri, size=16))
    write_bytes(join(uri, "part-99999.parquet"), b"left over by a job that was killed")
    table = pq.read_table(tmp_path / "emoji/part-00000.parquet")
    samples = read_all(uri, rows_per_shard=100)
    assert [sample.source_uri for sample in samples][: table.num_rows] == table["source_uri"].to_pylist()
    ids = [sample_id(sample.image, sample.caption) for sample in samples]
    assert ids[: table.num_rows] == table["sample_id"].to_pylist() and ids == sorted(ids)


def test_the_digest_follows_the_content_of_the_source(tmp_path):
    source = ImageSource(uri=write_folder(str(tmp_path), pictures(4)))
    before = plan_images(source).digest
    assert plan_images(source).digest == before
    (tmp_path / "000.txt").write_text("another caption")
    os.utime(tmp_path / "000.txt", (1, 1))
    assert plan_images(source).digest != before


def test_an_image_without_a_caption_is_delivered_and_not_dropped(tmp_path):
    write_folder(str(tmp_path), pictures(3))
    (tmp_path / "001.txt").unlink()
    assert [sample.caption is None for sample in read_all(str(tmp_path))] == [False, True, False]


def test_a_caption_without_its_image_is_delivered_with_the_problem(tmp_path):
    write_folder(str(tmp_path), pictures(3), table="metadata.jsonl")
    (tmp_path / "001.jpg").unlink()
    assert [(sample.problem or "").partition(":")[0] for sample in read_all(str(tmp_path))] == ["", "no_image", ""]


def test_a_damaged_tar_delivers_what_is_whole_and_names_itself(tmp_path):
    uri = write_tars(str(tmp_path), pictures(5))
    tar = tmp_path / "shard-0000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size * 2 // 5])
    *whole, last = read_all(uri)
    assert whole and all(sample.problem is None for sample in whole)
    assert last.source_uri == str(tar) and (last.problem or "").startswith("damaged_archive: ")


def test_a_path_without_bytes_in_parquet_is_a_problem_of_that_row(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.table({"image": pa.array([{"bytes": None, "path": "a.png"}, None], kind), "text": ["a", "b"]})
    pq.write_table(rows, tmp_path / "x.parquet")
    problems = [sample.problem or "" for sample in read_all(str(tmp_path))]
    assert "'a.png'" in problems[0] and "null" in problems[1]


def test_other_columns_are_read_by_name(tmp_path):
    _, image, _ = pictures(1)[0]
    pq.write_table(pa.table({"jpg": [image], "alt": ["hello"]}), tmp_path / "x.parquet")
    (sample,) = read_all(str(tmp_path), image_column="jpg", caption_column="alt")
    assert (sample.image, sample.caption) == (image, "hello")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": [b"x"], "alt": ["a"]},
            r"no text column caption or text\. Its columns: image \(binary\), alt \(string\)",
        ),
        ({"jpg": [b"x"], "text": ["a"]}, r"no column 'image' of image bytes\. Its columns: jpg \(binary\)"),
        ({"image": ["a.png"], "text": ["a"]}, r"no column 'image' of image bytes.*image \(string\)"),
    ],
)
def test_missing_columns_name_those_that_exist(columns, message, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=message):
        read_all(str(tmp_path))


def test_a_place_without_images_says_what_is_there(tmp_path):
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(SourceError, match=r"no images, no \.tar and no \.parquet \(1 \.md\)"):
        read_all(str(tmp_path))
    with pytest.raises(SourceError, match="no files at all"):
        read_all(str(tmp_path / "nothing"))


def test_a_mixture_is_refused_until_the_kind_is_said(tmp_path):
    write_folder(str(tmp_path), pictures(2))
    write_tars(str(tmp_path), pictures(3))
    with pytest.raises(SourceError, match=r"mixture of folder and webdataset.*--source\.kind"):
        read_all(str(tmp_path))
    assert len(read_all(str(tmp_path), kind="webdataset")) == 3


def test_captions_in_two_forms_are_refused(tmp_path):
    write_folder(str(tmp_path), pictures(2))
    write_folder(str(tmp_path), pictures(2), table="metadata.jsonl")
    with pytest.raises(SourceError, match="Captions both in"):
        read_all(str(tmp_path))


def test_a_broken_caption_table_names_the_line(tmp_path):
    write_folder(str(tmp_path), pictures(2), table="metadata.jsonl")
    with (tmp_path / "metadata.jsonl").open("a") as handle:
        handle.write("\nnot json\n")
    with pytest.raises(SourceError, match="line 3"):
        read_all(str(tmp_path))


@pytest.mark.parametrize("caption", ["a\u2028b", "a\x85b", "a\x0bb", "é \U0001f34e"])
def test_captions_keep_every_character_that_json_lets_stand_in_a_line(caption, tmp_path):
    write_folder(str(tmp_path), pictures(2))
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    rows = [{"file_name": name, "text": text} for (name, *_), text in zip(pictures(2), (caption, "b"), strict=True)]
    lines = [json.dumps(row, ensure_ascii=False).replace("\x0b", "\\u000b") for row in rows]
    text = "\n" + "\r\n\r\n".join(lines) + "\n"  # with empty lines, as an editor on Windows leaves them
    (tmp_path / "captions.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert [sample.caption for sample in read_all(str(tmp_path))] == [caption, "b"]


def test_a_caption_table_that_is_not_utf_8_and_one_that_is_no_file_are_refused(tmp_path):
    write_folder(str(tmp_path), pictures(2), table="captions.jsonl")
    table = tmp_path / "captions.jsonl"
    table.write_bytes(table.read_bytes().replace(b"picture", b"pi\xe9ture"))
    with pytest.raises(SourceError, match=r"captions\.jsonl' is not UTF-8 \(.*\)\. Save it as UTF-8"):
        read_all(str(tmp_path))
    table.unlink()
    os.mkfifo(table)
    with pytest.raises(SourceError, match=r"captions\.jsonl' is no plain file\. Replace it by one, or remove it"):
        read_all(str(tmp_path))


def test_a_source_without_a_place_or_without_anything_of_its_kind_is_refused(tmp_path):
    with pytest.raises(
        SourceError, match=r"The source has no URI\. Give --source\.uri s3://bucket/key or a local path"
    ):
        read_all("")
    write_folder(str(tmp_path), pictures(2))
    with pytest.raises(SourceError, match=r"holds nothing to read as webdataset \(.*2 \.txt.*\)\. Check URI and kind"):
        read_all(str(tmp_path), kind="webdataset")


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"nonsense, and long enough to have a footer")
    with pytest.raises(SourceError, match=r"x\.parquet' is not a parquet file"):
        read_all(str(tmp_path))


def test_keys_of_tar_members_end_at_the_first_dot_of_the_file_name():
    assert split_name("a.b/0007.seg.PNG") == ("a.b/0007", ".seg.png")


def test_folders_inside_a_source_are_read_with_their_own_caption_tables(tmp_path):
    write_folder(str(tmp_path / "one"), pictures(2), table="metadata.jsonl")
    write_folder(str(tmp_path / "two"), pictures(2, first=2), table="metadata.jsonl")
    assert [s.caption for s in read_all(str(tmp_path))] == [f"picture number {n}" for n in range(4)]


def test_hidden_files_are_no_samples_and_underscores_hide_nothing(tmp_path):
    name, image, caption = pictures(1)[0]
    write_folder(str(tmp_path), [(f"_{name}", image, caption)])
    write_bytes(str(tmp_path / f"._{name}"), b"what macOS leaves beside a file")
    write_bytes(str(tmp_path / ".cache" / name), image)
    assert [Path(sample.source_uri).name for sample in read_all(str(tmp_path))] == [f"_{name}"]


def test_names_with_pattern_characters_are_plain_names(tmp_path):
    name, image, caption = pictures(1)[0]
    write_folder(str(tmp_path), [(f"[1]*?{name}", image, caption)])
    assert [sample.image for sample in read_all(str(tmp_path))] == [image]


def test_other_image_formats_are_listed_so_that_the_ledger_names_them(tmp_path):
    write_folder(str(tmp_path), [("a.gif", b"GIF89a", "a gif"), *pictures(1)])
    assert len(read_all(str(tmp_path))) == 2


def test_a_tar_without_samples_reads_as_empty(tmp_path):
    (tmp_path / "empty.tar").write_bytes(tar_bytes({}))
    assert read_all(str(tmp_path)) == []
    assert io.BytesIO(tar_bytes({})).getbuffer().nbytes > 0


def test_read_images_is_the_same_multiset_as_a_ray_dataset(cluster, tmp_path):
    from d2f_core.data.sources.images import read_images

    items = pictures(13)
    rows = read_images(ImageSource(uri=write_tars(str(tmp_path), items))).take_all()
    assert sorted((row["image"], row["caption"]) for row in rows) == sorted((image, text) for _, image, text in items)
