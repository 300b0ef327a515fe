"""Small sets of pairs with keypoints, in the layouts that the readers know."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from d2f_core.data.sources.pair_sample import PairImage, PairSample
from d2f_core.storage import join, write_bytes
from tests.data.pictures import file_bytes, pixels

WIDTH, HEIGHT = 60, 40
CATEGORIES = ("aeroplane", "cat")
IMAGES = 4
"""Of each category."""
SLOTS = 30
SEEN = (0, 4, 5, 7)
"""Ids of the keypoints that the first image of a category shows; each further one lacks one of them."""


def image_name(category: str, number: int) -> str:
    return f"2008_{CATEGORIES.index(category):03d}{number:03d}"


def keypoints(number: int) -> dict[str, list[int] | None]:
    """As SPair-71k writes them: integer pixels by id, null for those not seen."""
    seen = [slot for slot in SEEN if slot != SEEN[number % len(SEEN)]] if number else SEEN
    return {str(slot): [slot + number, 2 * slot + number] if slot in seen else None for slot in range(SLOTS)}


def image_annotation(category: str, number: int) -> dict[str, Any]:
    return {
        "filename": f"{image_name(category, number)}.jpg",
        "src_database": "The VOC2008 Database",
        "src_annotation": "PASCAL VOC2008",
        "src_image": "flickr",
        "image_width": WIDTH,
        "image_height": HEIGHT,
        "image_depth": 3,
        "category": category,
        "pose": "Left",
        "truncated": 0,
        "occluded": 0,
        "difficult": 0,
        "bndbox": [5, 3, 45, 33],
        "kps": keypoints(number),
        "azimuth_id": (3 * number) % 8,
    }


def pair_annotation(number: int, category: str, source: int, target: int) -> dict[str, Any]:
    first, second = keypoints(source), keypoints(target)
    seen = [slot for slot in first if first[slot] and second[slot]]
    sides = {}
    for side, image, places in (("src", source, first), ("trg", target, second)):
        sides |= {
            f"{side}_imname": f"{image_name(category, image)}.jpg",
            f"{side}_imsize": [WIDTH, HEIGHT, 3],
            f"{side}_bndbox": [5, 3, 45 + image, 33],
            f"{side}_pose": "Left",
            f"{side}_kps": [places[slot] for slot in seen],
        }
    grades = {"viewpoint_variation": 1, "scale_variation": 0, "truncation": 2, "occlusion": 3}
    return {"pair_id": number, "category": category, "kps_ids": seen, "mirror": 0, **sides, **grades}


def pair_name(number: int, category: str, source: int, target: int) -> str:
    return f"{number:06d}-{image_name(category, source)}-{image_name(category, target)}:{category}"


PAIRS = {
    "trn": [(0, "aeroplane", 0, 1), (1, "aeroplane", 1, 2), (2, "cat", 0, 3), (3, "cat", 3, 0)],
    "val": [(0, "cat", 1, 2)],
    "test": [(1, "aeroplane", 2, 3), (0, "aeroplane", 0, 2)],
}
"""In the order of the lists, which is not that of the numbers."""


def write_json(uri: str, content: Any) -> None:
    write_bytes(uri, json.dumps(content).encode())


def write_spair(root: str) -> str:
    """SPair-71k's directories with eight images and seven pairs; the small layout has the first pair of each split."""
    for category in CATEGORIES:
        for number in range(IMAGES):
            name = f"{category}/{image_name(category, number)}"
            write_bytes(join(root, f"JPEGImages/{name}.jpg"), file_bytes(pixels(number, HEIGHT, WIDTH), "JPEG"))
            write_bytes(join(root, f"Segmentation/{name}.png"), b"not read")
            write_json(join(root, f"ImageAnnotation/{name}.json"), image_annotation(category, number))
    for split, pairs in PAIRS.items():
        names = [pair_name(*pair) for pair in pairs]
        for name, pair in zip(names, pairs, strict=True):
            write_json(join(root, f"PairAnnotation/{split}/{name}.json"), pair_annotation(*pair))
        for layout, listed in (("large", names), ("small", names[:1])):
            write_bytes(join(root, f"Layout/{layout}/{split}.txt"), "".join(f"{name}\n" for name in listed).encode())
    return root


def write_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        write_bytes(str(folder / name), file_bytes(pixels(number, HEIGHT, WIDTH)))


def own_row(**changes: Any) -> dict[str, Any]:
    """A pair as one writes it by hand, a change of None removing a key."""
    row = {
        "source_image_id": "a.png",
        "target_image_id": "b.png",
        "category": "chair",
        "source_keypoints": [[12.5, 30.0], [50.5, 31.5], None],
        "target_keypoints": [[30.5, 22.0], [10.0, 20.0], [1.0, 2.0]],
        "source_box": [10, 20, 40, 15.5],
        "target_box": [1, 2, 40, 30],
        "keypoint_names": ["left arm", "right arm", "seat"],
        **changes,
    }
    return {key: value for key, value in row.items() if value is not None}


def write_lines(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    write_bytes(str(path), "\n".join(lines).encode())
    return str(path)


def coco(objects: int = 5, *, per_image: int = 1) -> dict[str, Any]:
    """Objects of one category with three keypoints, of which the object's number hides one in three."""
    points = [
        [v for place in range(3) for v in (10 + place + number, 5 + place, 1 if number % 3 == place else 2)]
        for number in range(objects)
    ]
    images = -(-objects // per_image)
    return {
        "images": [
            {"id": 100 + number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT}
            for number in range(images)
        ],
        "categories": [{"id": 7, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"], "skeleton": []}],
        "annotations": [
            {
                "id": number,
                "image_id": 100 + number // per_image,
                "category_id": 7,
                "iscrowd": 0,
                "num_keypoints": 3,
                "keypoints": points[number],
                "bbox": [2.5, 1, 30, 20],
            }
            for number in range(objects)
        ],
    }


JUNK: list[Any] = [None, True, -1, 10**400, 1e308, float("nan"), "", "cat", [], [None], [[1]], {}, {"a": []}, [{}]]
JUNK.append([10**400] * 4)
"""What may stand in place of any value of a JSON file."""


def images_of(sample: PairSample) -> tuple[PairImage, PairImage]:
    assert sample.source is not None and sample.target is not None
    return sample.source, sample.target


def same(first: np.ndarray, second: np.ndarray) -> bool:
    return first.dtype == second.dtype and np.array_equal(first, second, equal_nan=True)
