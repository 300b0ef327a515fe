"""SPair-71k is read from its own directories, in the order of its lists; a mistake costs the pairs that it is in."""

from typing import Any

import numpy as np
import pytest

from d2f_core.data.sources.config import PairSource
from d2f_core.data.sources.pairs import plan_pairs, read_pairs
from d2f_core.data.sources.sample import SourceError
from d2f_core.storage import join, write_bytes
from tests.data.pair_sources import (
    HEIGHT,
    JUNK,
    PAIRS,
    WIDTH,
    image_annotation,
    image_name,
    images_of,
    pair_annotation,
    pair_name,
    same,
    write_json,
    write_spair,
)
from tests.data.pictures import file_bytes, pixels

NAN = float("nan")


def names(split: str) -> list[str]:
    return [pair_name(*pair) for pair in PAIRS[split]]


def test_spairs_pairs_come_in_the_order_of_its_lists(tmp_path):
    root = write_spair(str(tmp_path))
    for layout, chosen in (("large", slice(None)), ("small", slice(1))):
        good, bad = read_pairs(PairSource(uri=root, layout=layout))
        listed = [(name, split) for split in ("trn", "val", "test") for name in names(split)[chosen]]
        assert [(sample.pair_id, sample.split) for sample in good] == listed and not bad
    assert [sample.pair_id for sample in read_pairs(PairSource(uri=root, splits=("test",)))[0]] == names("test")


def test_a_pair_of_spair_has_places_of_pixel_centres_and_what_either_image_shows(tmp_path):
    root = write_spair(str(tmp_path))
    sample = read_pairs(PairSource(uri=root))[0][0]
    source, target = images_of(sample)
    assert sample.keypoint_names == ("0", "4", "5", "7") and sample.visible.tolist() == [True, False, True, True]
    assert same(source.keypoints, np.float32([[0.5, 0.5], [4.5, 8.5], [5.5, 10.5], [7.5, 14.5]]))
    assert same(target.keypoints, np.float32([[1.5, 1.5], [NAN, NAN], [6.5, 11.5], [8.5, 15.5]]))
    assert (source.box, target.box, source.size) == ((5, 3, 40, 30), (5, 3, 41, 30), (WIDTH, HEIGHT))
    assert (sample.category, sample.viewpoint, sample.flip.tolist()) == ("aeroplane", 135.0, [-1] * 4)
    assert sample.difficulty == {"viewpoint_variation": 1, "scale_variation": 0, "truncation": 2, "occlusion": 3}
    assert target.image_id == f"JPEGImages/aeroplane/{image_name('aeroplane', 1)}.jpg"
    assert target.read() == file_bytes(pixels(1, HEIGHT, WIDTH), "JPEG")


def test_views_are_at_most_half_a_turn_apart(tmp_path):
    root = write_spair(str(tmp_path))
    turned = {"trn": [135.0, 135.0, 45.0, 45.0], "val": [135.0], "test": [135.0, 90.0]}
    assert [s.viewpoint for s in read_pairs(PairSource(uri=root))[0]] == [
        a for angles in turned.values() for a in angles
    ]
    annotation = image_annotation("cat", 1)
    del annotation["azimuth_id"]
    write_json(join(root, f"ImageAnnotation/cat/{image_name('cat', 1)}.json"), annotation)
    assert [s.viewpoint for s in read_pairs(PairSource(uri=root, splits=("val",)))[0]] == [None]


def test_flip_partners_are_told_by_a_file(tmp_path):
    root = write_spair(str(tmp_path / "spair"))
    write_json(str(tmp_path / "flips.json"), {"aeroplane": [[4, 5], ["7", "9"]]})
    good, _ = read_pairs(PairSource(uri=root, flip_partners=str(tmp_path / "flips.json")))
    assert good[0].flip.tolist() == [-1, 2, 1, -1] and good[2].flip.tolist() == [-1] * 4
    write_bytes(str(tmp_path / "flips.json"), b'{"aeroplane": 5}')
    with pytest.raises(SourceError, match="is not an object such as"):
        plan_pairs(PairSource(uri=root, flip_partners=str(tmp_path / "flips.json")))


def test_shards_of_spair_are_small_and_know_their_pairs(tmp_path):
    plan = plan_pairs(PairSource(uri=write_spair(str(tmp_path))), rows_per_shard=3)
    assert [len(list(shard.read())) for shard in plan.shards] == [shard.num_rows for shard in plan.shards] == [3, 3, 1]
    assert (plan.kind, plan.num_rows) == ("spair", 7)


def test_the_digest_changes_with_what_is_read(tmp_path):
    root = write_spair(str(tmp_path))
    asked: list[dict[str, Any]] = [{}, {"layout": "small"}, {"splits": ("val",)}, {"categories": ("cat",)}]
    assert len({plan_pairs(PairSource(uri=root, **how)).digest for how in asked}) == 4
    assert plan_pairs(PairSource(uri=root)).digest == plan_pairs(PairSource(uri=root, kind="spair")).digest


SPAIR_MISTAKES = {
    "a missing image": ("gone", "no_image: JPEGImages/aeroplane/2008_000001.jpg is not there"),
    "damaged json": ("{not json", "damaged_json: JSONDecodeError in 9 bytes"),
    "json of another kind": ("[1]", "damaged_json: a list, not an object"),
    "a keypoint outside": (
        {"src_kps": [[60, 1], [5, 10], [7, 14]]},
        "outside: keypoint 0 of the source is at (60.5, 1.5)",
    ),
    "an unknown category": ({"category": "zebra"}, "unknown_category: 'zebra' is not one of aeroplane, bicycle"),
    "a category as a path": ({"category": "../cat"}, "unknown_category"),
    "a climbing name": ({"src_imname": "../cat/x.jpg"}, "bad_name: it climbs out of its folder"),
    "a mirrored pair": ({"mirror": 1}, "mirrored"),
    "too few places": ({"trg_kps": [[1, 1]]}, "bad_annotation: 1 trg_kps for 3 kps_ids"),
    "places of another kind": ({"trg_kps": [[1, 1], 5, "x"]}, "bad_annotation: trg_kps is no list of x and y"),
    "a place that is null": ({"trg_kps": [[1, 1], None, [1, 2]]}, "bad_annotation: a visible keypoint has no position"),
    "no size": ({"src_imsize": None}, "bad_annotation: src_imsize is None, not 3 numbers"),
    "a size of no number": ({"src_imsize": [NAN, 40, 3]}, "bad_annotation: src_imsize is [nan, 40, 3]"),
    "a box turned around": (
        {"trg_bndbox": [45, 3, 5, 33]},
        "no_box: the box of the target is [45.0, 3.0, -40.0, 30.0]",
    ),
    "an id that is no number": ({"kps_ids": ["0", "5", "nose"]}, "bad_annotation: the keypoint id 'nose' is no number"),
}


@pytest.mark.parametrize("mistake", SPAIR_MISTAKES)
def test_a_mistake_in_spair_costs_one_pair_and_stands_in_the_ledger(mistake, tmp_path):
    root = write_spair(str(tmp_path))
    what, reason = SPAIR_MISTAKES[mistake]
    name = names("trn")[0]
    uri = join(root, f"PairAnnotation/trn/{name}.json")
    if what == "gone":
        (tmp_path / f"JPEGImages/aeroplane/{image_name('aeroplane', 1)}.jpg").unlink()
    elif isinstance(what, str):
        write_bytes(uri, what.encode())
    else:
        write_json(uri, pair_annotation(*PAIRS["trn"][0]) | what)
    good, bad = read_pairs(PairSource(uri=root))
    lost = 2 if what == "gone" else 1  # the image is in two pairs
    assert len(good) == 7 - lost and len(bad) == lost and name not in [sample.pair_id for sample in good]
    assert (bad[0].sample_id, bad[0].source_uri) == (name, uri) and bad[0].reason.startswith(reason)


def test_files_that_spairs_lists_name_in_vain_are_in_the_ledger(tmp_path):
    root = write_spair(str(tmp_path))
    (tmp_path / f"PairAnnotation/val/{names('val')[0]}.json").unlink()
    (tmp_path / f"ImageAnnotation/cat/{image_name('cat', 0)}.json").unlink()
    write_bytes(join(root, f"ImageAnnotation/aeroplane/{image_name('aeroplane', 3)}.json"), b"{")
    with (tmp_path / "Layout/large/trn.txt").open("a") as listed:
        listed.write(f"\n{names('trn')[0]}\n")
    good, bad = read_pairs(PairSource(uri=root))
    assert [sample.pair_id for sample in good] == [*names("trn")[:2], names("test")[1]]
    nameless = f"no_annotation: ImageAnnotation/cat/{image_name('cat', 0)}.json is not there"
    assert [entry.reason for entry in bad[:4]] == [
        nameless,
        nameless,
        "duplicate",
        "no_annotation: the file is not there",
    ]
    assert bad[4].reason.startswith("damaged_json: JSONDecodeError in 1 bytes (ImageAnnotation/aeroplane/")


def test_s3_is_read_like_a_disk(bucket, tmp_path):
    here, there = (read_pairs(PairSource(uri=write_spair(uri))) for uri in (str(tmp_path), join(bucket, "spair")))
    assert [sample.pair_id for sample in there[0]] == [sample.pair_id for sample in here[0]]
    for one, other in zip(here[0], there[0], strict=True):
        for image, twin in zip(images_of(one), images_of(other), strict=True):
            assert same(image.keypoints, twin.keypoints) and image.read() == twin.read()


@pytest.mark.parametrize("key", pair_annotation(*PAIRS["trn"][0]))
def test_whatever_stands_in_place_of_a_value_the_other_pairs_are_read(key, tmp_path):
    root, pair = write_spair(str(tmp_path)), PAIRS["trn"][0]
    for value in JUNK:
        write_json(join(root, f"PairAnnotation/trn/{pair_name(*pair)}.json"), pair_annotation(*pair) | {key: value})
        good, bad = read_pairs(PairSource(uri=root, splits=("trn",)))
        assert len(good) + len(bad) == 4 and [sample.pair_id for sample in good][-3:] == names("trn")[1:]
