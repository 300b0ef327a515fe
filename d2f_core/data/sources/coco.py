"""Objects with keypoints in COCO's format, paired within each category.

Which objects are paired depends on their ids alone: in an order that a hash makes of them, each is the source of the
next few of its category, those of the same image left out, if some keypoint is visible in both. Every object is then
source and target about equally often, and a file that grows keeps most of its pairs.

Keypoints are integer indices of pixels, to which 0.5 is added (as Detectron2 does); boxes are x, y, width and height
from the image's corner. A keypoint's flag: 0, it has no place; 1, it is hidden; 2, it is visible. Crowds and objects
without keypoints make no pairs.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from d2f_core.data.errors import BadSampleError
from d2f_core.data.sources.pair_rows import RowRules
from d2f_core.data.sources.pair_sample import (
    PIXEL_CENTRE,
    PairImage,
    PairSample,
    checked,
    flip_by_name,
    flip_by_pairs,
    needed,
    numbers_of,
    parse_object,
)
from d2f_core.data.sources.sample import SourceError
from d2f_core.storage import filesystem, join, list_tree, read_bytes

NO_PLACE, VISIBLE = 0, 2


@dataclass(frozen=True, kw_only=True, eq=False)
class CocoObject:
    """An object with its keypoints."""

    number: int
    """The annotation's id."""
    image: PairImage
    visible: np.ndarray
    """bool [keypoints]"""
    category: str
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CocoShard:
    """One file of annotations."""

    uri: str
    rules: RowRules
    partners: int

    @property
    def num_rows(self) -> None:
        return None

    @property
    def folder(self) -> str:
        """Of the images."""
        return self.rules.images or self.uri.rpartition("/")[0]

    def read(self) -> Iterator[PairSample]:
        """First what cannot be used, object by object, then the pairs of the others."""
        try:
            content = parse_object(read_bytes(self.uri))
            images = _by_id(content, "images")
            categories = _by_id(content, "categories")
            annotations = needed(content, "annotations", list)
        except BadSampleError as error:
            yield PairSample(source_uri=self.uri, problem=str(error))
            return
        groups: dict[str, list[CocoObject]] = defaultdict(list)
        there = _files(self.folder)
        for annotation in annotations:
            try:
                if found := self._object(annotation, images, categories, there):
                    groups[found.category].append(found)
            except BadSampleError as error:
                number = annotation.get("id") if isinstance(annotation, dict) else None
                yield PairSample(source_uri=f"{self.uri}#annotation={number}", problem=str(error))
        for category in sorted(groups):
            yield from self._pairs(sorted(groups[category], key=_order))

    def _object(
        self,
        annotation: Any,
        images: Mapping[Any, Mapping[str, Any]],
        categories: Mapping[Any, Mapping[str, Any]],
        there: Collection[str],
    ) -> CocoObject | None:
        if not isinstance(annotation, dict):
            raise BadSampleError("bad_annotation: it is no object")
        if annotation.get("iscrowd") or annotation.get("num_keypoints") == 0:
            return None
        category, image = (_named(annotation, key, rows) for key, rows in (("category", categories), ("image", images)))
        names = tuple(str(name) for name in needed(category, "keypoints", list))
        flat = numbers_of(annotation.get("keypoints"), 3 * len(names), "keypoints")
        points = np.array(flat, np.float32).reshape(-1, 3)
        found = CocoObject(
            number=needed(annotation, "id", int),
            image=self._image(annotation, image, points, there),
            visible=points[:, 2] == VISIBLE,
            category=needed(category, "name", str),
            names=names,
        )
        self._pair(found, found)  # which checks each object once, before any is paired
        return found

    def _image(
        self, annotation: Mapping[str, Any], image: Mapping[str, Any], points: np.ndarray, there: Collection[str]
    ) -> PairImage:
        name = needed(image, "file_name", str)
        if name not in there:
            raise BadSampleError(f"no_image: {name} is not there")
        width, height = numbers_of([image.get("width"), image.get("height")], 2, "width and height")
        return PairImage(
            image_id=name,
            uri=join(self.folder, name),
            size=(int(width), int(height)),
            box=numbers_of(annotation.get("bbox"), 4, "bbox"),
            keypoints=np.where(points[:, 2:] == NO_PLACE, np.float32(np.nan), points[:, :2] + PIXEL_CENTRE),
        )

    def _pairs(self, objects: list[CocoObject]) -> Iterator[PairSample]:
        for number, source in enumerate(objects):
            following = (
                objects[(number + step) % len(objects)] for step in range(1, min(self.partners + 1, len(objects)))
            )
            for target in following:
                if source.image.image_id != target.image.image_id and (source.visible & target.visible).any():
                    yield self._pair(source, target)

    def _pair(self, source: CocoObject, target: CocoObject) -> PairSample:
        pairs = self.rules.flip_partners.get(source.category)
        names = source.names
        sample = PairSample(
            source_uri=f"{self.uri}#annotations={source.number},{target.number}",
            pair_id=f"{_split(self.uri)}:{source.number}-{target.number}",
            category=source.category,
            split=_split(self.uri),
            source=source.image,
            target=target.image,
            visible=source.visible & target.visible,
            flip=flip_by_name(names) if pairs is None else flip_by_pairs(names, pairs),
            keypoint_names=names,
        )
        return checked(sample, self.rules.categories)


def _split(uri: str) -> str:
    return PurePosixPath(uri).stem


def _files(folder: str) -> set[str]:
    root = filesystem(folder)[1]
    return {file.removeprefix(root).lstrip("/") for file in list_tree(folder)}


def _by_id(content: Mapping[str, Any], key: str) -> dict[Any, dict[str, Any]]:
    rows = needed(content, key, list)
    if not all(isinstance(row, dict) and isinstance(row.get("id"), int | str) for row in rows):
        raise BadSampleError(f"bad_annotation: {key} holds something that is no object with an id")
    return {row["id"]: row for row in rows}


def _named(annotation: Mapping[str, Any], key: str, rows: Mapping[Any, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The category or image that an annotation names by its id."""
    number = annotation.get(f"{key}_id")
    if not isinstance(number, int | str) or number not in rows:
        code = "unknown_category" if key == "category" else "no_image"
        raise BadSampleError(f"{code}: this file lists no {key} with the id {number!r}")
    return rows[number]


def _order(found: CocoObject) -> bytes:
    return hashlib.blake2b(str(found.number).encode(), digest_size=16).digest()


def plan_coco(files: Collection[str], rules: RowRules, partners: int) -> list[CocoShard]:
    """One shard per file of annotations among `files`, sorted by name.

    Raises:
        SourceError: the splits that are asked for are names of no file.
    """
    uris = sorted(uri for uri in files if uri.endswith(".json"))
    found = [uri for uri in uris if not rules.splits or _split(uri) in rules.splits]
    if not found and uris:
        raise SourceError(f"No file is named {', '.join(rules.splits)}: there are {', '.join(map(_split, uris))}.")
    return [CocoShard(uri=uri, rules=rules, partners=partners) for uri in found]
