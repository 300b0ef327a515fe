"""Pairs with keypoints: every layout gives the same kind of pair, in a fixed order, and what is wrong has a reason."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2f_core.data.schema import check_schema
from d2f_core.data.sources.config import PairSource
from d2f_core.data.sources.pair_sample import PAIR_SCHEMA, PairSample, content_id, pairs_to_table
from d2f_core.data.sources.pairs import plan_pairs, read_pairs
from d2f_core.data.sources.sample import SourceError
from d2f_core.storage import write_bytes
from tests.data.pair_sources import (
    HEIGHT,
    JUNK,
    WIDTH,
    coco,
    images_of,
    own_row,
    same,
    write_images,
    write_json,
    write_lines,
    write_spair,
)
from tests.data.pictures import file_bytes, pixels

NAN = float("nan")


def assert_alike(first: PairSample, second: PairSample) -> None:
    fields = ("pair_id", "category", "split", "keypoint_names", "viewpoint", "difficulty")
    assert [getattr(first, name) for name in fields] == [getattr(second, name) for name in fields]
    assert same(first.visible, second.visible) and same(first.flip, second.flip)
    for one, other in zip(images_of(first), images_of(second), strict=True):
        assert (one.image_id, one.size, one.box) == (other.image_id, other.size, other.box)
        assert same(one.keypoints, other.keypoints) and one.read() == other.read()


def test_a_table_of_pairs_gives_back_the_pairs_that_it_was_written_from(tmp_path):
    root = write_spair(str(tmp_path / "spair"))
    write_json(str(tmp_path / "flips.json"), {"aeroplane": [[4, 5]], "cat": [[0, 7]]})
    written, _ = read_pairs(PairSource(uri=root, flip_partners=str(tmp_path / "flips.json")))
    table = pairs_to_table(written)
    check_schema(table.schema, PAIR_SCHEMA, where="the table")
    (tmp_path / "own").mkdir()
    pq.write_table(table, tmp_path / "own/pairs.parquet", row_group_size=2)
    source = PairSource(uri=str(tmp_path / "own"), images=root)
    read, bad = read_pairs(source)
    assert not bad and len(read) == 7
    for first, second in zip(written, read, strict=True):
        assert_alike(first, second)
        assert first.source_uri == second.source_uri
    assert [shard.num_rows for shard in plan_pairs(source, rows_per_shard=4).shards] == [4, 3]
    assert {
        sample.split for sample in read_pairs(PairSource(uri=str(tmp_path / "own"), images=root, splits=("val",)))[0]
    } == {"val"}


def test_a_line_needs_only_images_category_points_and_boxes(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    good, bad = read_pairs(PairSource(uri=write_lines(tmp_path / "pairs.jsonl", own_row(), "", own_row(pair_id="x"))))
    assert not bad and [sample.pair_id for sample in good] == ["a.png:b.png", "x"]
    sample = good[0]
    source, target = images_of(sample)
    assert sample.visible.tolist() == [True, True, False] and sample.flip.tolist() == [1, 0, -1]
    assert same(source.keypoints, np.float32([[12.5, 30], [50.5, 31.5], [NAN, NAN]]))
    assert (source.size, source.box, sample.split) == ((WIDTH, HEIGHT), (10, 20, 40, 15.5), "")
    assert target.read() == file_bytes(pixels(1, HEIGHT, WIDTH))


def test_rows_of_parquet_may_hold_the_images(tmp_path):
    image, other = (file_bytes(pixels(number, HEIGHT, WIDTH)) for number in (0, 1))
    row = own_row(source_image_id=None, target_image_id=None) | {"source_image": image, "target_image": other}
    rows = [row, row | {"target_image": b"no image"}, row | {"source_size": [1, 1]}, row | {"category": "table"}]
    pq.write_table(
        pa.Table.from_pylist([{**row, "source_size": row.get("source_size")} for row in rows]), tmp_path / "p.parquet"
    )
    good, bad = read_pairs(PairSource(uri=str(tmp_path), categories=("chair",)))
    source, target = images_of(good[0])
    assert len(good) == 1 and source.image_id == content_id(image) and target.read() == other and target.uri is None
    assert [entry.reason for entry in bad] == [
        "undecodable: not a PNG, JPEG, WEBP file",
        f"bad_annotation: source_size is [1, 1], its file is {WIDTH}x{HEIGHT} px",
        "unknown_category: 'table' is not one of chair",
    ]


OWN_MISTAKES = {
    "damaged_json: JSONDecodeError": '{"category": ',
    "damaged_json: a list": "[]",
    "no_image: c.png is not there": {"source_image_id": "c.png"},
    "bad_name: it climbs": {"source_image_id": "../a.png"},
    "undecodable: not a PNG": {"source_image_id": "text.png"},
    "outside: keypoint 0 of the source is at (60.5, 1) of 60x40 px": {"source_keypoints": [[60.5, 1], [1, 1], None]},
    "outside: keypoint 1 of the target": {"target_keypoints": [[1, 1], [1, -0.5], None]},
    "outside: keypoint 2 of the source": {"source_keypoints": [[1, 1], [1, 1], [float("inf"), 1]]},
    "bad_annotation: 2 keypoints of the source, 3 of the target": {"source_keypoints": [[1, 1], [1, 1]]},
    "bad_annotation: source_keypoints is no list": {"source_keypoints": [[1, 1], [1, 1, 1], None]},
    "bad_annotation: category is 5, not a str": {"category": 5},
    "bad_annotation: source_box is [1, 2, 3], not 4 numbers": {"source_box": [1, 2, 3]},
    "bad_annotation: target_box is '1234'": {"target_box": "1234"},
    "no_box: the box of the source is [1.0, 2.0, 0.0, 3.0]": {"source_box": [1, 2, 0, 3]},
    "bad_annotation: a visible keypoint has no position": {"visible": [True, True, True]},
    "bad_annotation: visible is [1, 0, 1]": {"visible": [1, 0, 1]},
    "bad_annotation: 3 keypoints of the source, 1 of the pair": {"visible": [True]},
    "bad_flip: [1, 2, 0]": {"flip": [1, 2, 0]},
    "bad_flip: [-1, -1, 3]": {"flip": [-1, -1, 3]},
    "bad_annotation: flip is [1]": {"flip": [1]},
    "bad_annotation: keypoint_names is ['left arm'], not 3 names": {"keypoint_names": ["left arm"]},
    "bad_annotation: difficulty is 'hard'": {"difficulty": "hard"},
    "bad_annotation: viewpoint is": {"viewpoint": "left"},
}


def test_a_mistake_in_a_line_costs_that_line(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    write_bytes(str(tmp_path / "text.png"), b"no image")
    rows = [row if isinstance(row, str) else own_row(**row) for row in OWN_MISTAKES.values()]
    good, bad = read_pairs(
        PairSource(uri=write_lines(tmp_path / "pairs.jsonl", own_row(), *rows, own_row(pair_id="last")))
    )
    assert [sample.pair_id for sample in good] == ["a.png:b.png", "last"]
    assert [entry.source_uri.rpartition("#")[2] for entry in bad] == [f"line={n + 2}" for n in range(len(OWN_MISTAKES))]
    for entry, reason in zip(bad, OWN_MISTAKES, strict=True):
        assert entry.reason.startswith(reason), entry.reason


def test_pairs_of_files_that_call_their_images_alike_are_all_kept(tmp_path):
    """Each folder has its own a.png and b.png; only the second pair of names that are taken already needs another."""
    folders = [tmp_path / name for name in ("chairs", "desks")]
    for folder in folders:
        write_images(folder, "a.png", "b.png")
    write_lines(folders[0] / "pairs.jsonl", own_row())
    write_lines(folders[1] / "pairs.jsonl", own_row(), own_row(), own_row(pair_id="own"))
    good, bad = read_pairs(PairSource(uri=str(tmp_path)))
    named = f"{folders[1]}/a.png:{folders[1]}/b.png"
    assert [sample.pair_id for sample in good] == ["a.png:b.png", named, "own"]
    assert [images_of(sample)[0].uri for sample in good] == [f"{folders[n]}/a.png" for n in (0, 1, 1)]
    assert [(entry.sample_id, entry.reason) for entry in bad] == [(named, "duplicate")]


def test_a_damaged_table_delivers_what_is_whole(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    rows = [own_row(pair_id=f"{number:04d}") for number in range(2000)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=500, compression="none", use_dictionary=False)
    data = bytearray(sink.getvalue().to_pybytes())
    at = pq.ParquetFile(pa.BufferReader(bytes(data))).metadata.row_group(2).column(0).data_page_offset
    data[at : at + 40] = b"\xff" * 40
    write_bytes(str(tmp_path / "p.parquet"), bytes(data))
    good, bad = read_pairs(PairSource(uri=str(tmp_path / "p.parquet")))
    assert len(good) + sum(entry.rows for entry in bad) == 2000
    assert len(good) >= 1000 and bad[0].code == "damaged_file"


def write_coco(folder: Path, content: Any, name: str = "keypoints.json") -> str:
    write_images(folder / "images", *(f"{number}.png" for number in range(12)))
    write_json(str(folder / name), content)
    return str(folder / name)


def test_objects_of_coco_are_paired_within_their_category(tmp_path):
    source = PairSource(uri=write_coco(tmp_path, coco()), images=str(tmp_path / "images"), partners_per_object=3)
    good, bad = read_pairs(source)
    assert not bad and len(good) == 15 and len({sample.pair_id for sample in good}) == 15
    sample = next(sample for sample in good if sample.pair_id == "keypoints:0-1" or sample.pair_id == "keypoints:1-0")
    ends = [int(number) for number in str(sample.pair_id).partition(":")[2].split("-")]
    for image, number in zip(images_of(sample), ends, strict=True):
        expected = [[10.5 + place + number, 5.5 + place] for place in range(3)]  # hidden ones have a place
        assert same(image.keypoints, np.float32(expected)) and image.box == (2.5, 1, 30, 20)
        assert image.read() == file_bytes(pixels(number, HEIGHT, WIDTH))
    assert sample.visible.tolist() == [False, False, True] and sample.flip.tolist() == [-1, 2, 1]
    assert (sample.category, sample.split) == ("person", "keypoints")
    assert [sum(s.pair_id.endswith(f"-{number}") for s in good if s.pair_id) for number in range(5)] == [3] * 5


def test_objects_of_one_image_or_without_a_common_keypoint_make_no_pair(tmp_path):
    content = coco(6, per_image=2)
    content["annotations"][0]["keypoints"] = [0, 0, 0] * 3
    content["annotations"][1] |= {"iscrowd": 1, "keypoints": []}
    content["annotations"][2]["num_keypoints"] = 0
    good, bad = read_pairs(PairSource(uri=write_coco(tmp_path, content), images=str(tmp_path / "images")))
    assert sorted(str(sample.pair_id).partition(":")[2] for sample in good) == ["3-4", "3-5", "4-3", "5-3"] and not bad


COCO_MISTAKES = {
    "outside: keypoint 0 of the source is at (60.5, 5.5)": {"keypoints": [60, 5, 2, 1, 1, 2, 1, 1, 2]},
    "unknown_category: this file lists no category with the id 8": {"category_id": 8},
    "no_image: this file lists no image with the id [1]": {"image_id": [1]},
    "no_image: gone.png is not there": {"image_id": 999},
    "bad_annotation: keypoints is [1, 2], not 9 numbers": {"keypoints": [1, 2]},
    "bad_annotation: bbox is None": {"bbox": None},
    "no_box": {"bbox": [1, 1, 0, 5]},
}


def test_a_mistake_in_coco_costs_that_object(tmp_path):
    content = coco(len(COCO_MISTAKES) + 3)
    content["images"].append({"id": 999, "file_name": "gone.png", "width": WIDTH, "height": HEIGHT})
    for annotation, change in zip(content["annotations"], COCO_MISTAKES.values(), strict=False):
        annotation |= change
    uri = write_coco(tmp_path, content)
    good, bad = read_pairs(PairSource(uri=uri, images=str(tmp_path / "images")))
    assert len(good) == 6 and [entry.source_uri for entry in bad] == [f"{uri}#annotation={n}" for n in range(7)]
    for entry, reason in zip(bad, COCO_MISTAKES, strict=True):
        assert entry.reason.startswith(reason)


def test_a_damaged_file_of_coco_is_in_the_ledger(tmp_path):
    uri = write_coco(tmp_path, {"images": [], "annotations": []})
    write_bytes(str(tmp_path / "broken.json"), b'{"images": [')
    good, bad = read_pairs(PairSource(uri=str(tmp_path), images=str(tmp_path / "images"), kind="coco"))
    assert not good and [(entry.source_uri, entry.code) for entry in bad] == [
        (str(tmp_path / "broken.json"), "damaged_json"),
        (uri, "bad_annotation"),
    ]


def test_a_source_that_cannot_be_meant_is_refused(tmp_path):
    spair, own = write_spair(str(tmp_path / "spair")), tmp_path / "own"
    (tmp_path / "spair/Layout/large/val.txt").unlink()
    write_lines(own / "a.jsonl", own_row())
    write_json(str(own / "b.json"), {})
    pq.write_table(pa.table({"category": ["a"]}), tmp_path / "a.parquet")
    refused = {
        "no split \\['train'\\]": {"uri": spair, "splits": ("train",)},
        "has 0 files Layout/large/val.txt": {"uri": spair},
        "a mixture of jsonl and coco": {"uri": str(own)},
        "no .parquet, .jsonl, .json and no SPair-71k": {"uri": str(tmp_path / "spair/JPEGImages")},
        "is no table of pairs. It needs category": {"uri": str(tmp_path / "a.parquet")},
        "No file is named dev: there are b": {"uri": str(own / "b.json"), "splits": ("dev",)},
        "The source has no URI": {},
        "must be at least 1": {"partners_per_object": 0},
    }
    for message, how in refused.items():
        with pytest.raises(SourceError, match=message):
            plan_pairs(PairSource(**how))


@pytest.mark.parametrize(
    "key", [*own_row(), "visible", "flip", "pair_id", "split", "viewpoint", "difficulty", "source_size"]
)
def test_whatever_stands_in_place_of_a_value_the_other_lines_are_read(key, tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    rows = [own_row() | {key: value} for value in JUNK]
    good, bad = read_pairs(PairSource(uri=write_lines(tmp_path / "pairs.jsonl", *rows, own_row(pair_id="last"))))
    assert len(good) + len(bad) == len(rows) + 1 and good[-1].pair_id == "last"


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, rows in coco().items() for key in rows[0]])
def test_whatever_stands_in_place_of_a_value_coco_is_read_or_refused(part, key, tmp_path):
    uri = write_coco(tmp_path, coco())
    for value in JUNK:
        content = coco()
        content[part][0][key] = value
        write_json(uri, content)
        good, bad = read_pairs(PairSource(uri=uri, images=str(tmp_path / "images"), partners_per_object=2))
        assert len(good) in (8, 10) or bad  # one object may have become a crowd
