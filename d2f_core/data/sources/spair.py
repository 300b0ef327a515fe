"""SPair-71k as its authors' archive lays it out (Min et al., 2019, arXiv:1908.10543).

    ImageAnnotation/<category>/<name>.json         kps: {"0": [x, y] or null, ...}, azimuth_id: 0 to 7, 45 degrees each
    JPEGImages/<category>/<name>.jpg
    Layout/{large,small}/{trn,val,test}.txt        the names of a split's pairs, one a line
    PairAnnotation/{trn,val,test}/<id>-<source>-<target>:<category>.json

A pair's file names the keypoints seen in both images (kps_ids) and their places (src_kps, trg_kps); those seen in one
alone come from the annotation of that image, so that the place of a flip partner is known whenever it can be seen.
Places are integer indices of pixels: 0.5 is added. Boxes are corners (xmin, ymin, xmax, ymax), and their sides the
differences, as all who publish figures take them. Keypoints are named by their ids.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2f_core.data.errors import BadSampleError
from d2f_core.data.sources.config import PairSource
from d2f_core.data.sources.listing import Sizes, file_problem
from d2f_core.data.sources.pair_sample import (
    PIXEL_CENTRE,
    PairImage,
    PairSample,
    checked,
    flip_by_pairs,
    needed,
    numbers_of,
    parse_object,
    points_of,
)
from d2f_core.data.sources.sample import MAX_TEXT_BYTES, SourceError
from d2f_core.data.sources.tar import CLIMBS
from d2f_core.storage import file_exists, join, read_bytes

CATEGORIES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow dog horse motorbike person pottedplant sheep train "
    "tvmonitor".split()
)
SPLITS = ("trn", "val", "test")
GRADES = ("viewpoint_variation", "scale_variation", "truncation", "occlusion")
VIEWS = 8
READ_THREADS = 16

FlipPartners = Mapping[str, list[list[str]]]
Pair = tuple[str, str, str | None]
"""Split, name, and why it cannot be read."""


@dataclass(frozen=True, kw_only=True)
class SpairShard:
    root: str
    pairs: tuple[Pair, ...]
    categories: tuple[str, ...]
    flip_partners: FlipPartners

    @property
    def num_rows(self) -> int:
        return len(self.pairs)

    def read(self) -> Iterator[PairSample]:
        image_of = functools.cache(functools.partial(_annotation, self.root))
        with ThreadPoolExecutor(READ_THREADS) as pool:
            yield from pool.map(lambda pair: self._read(pair, image_of), self.pairs)

    def _read(self, pair: Pair, image_of: Callable[[str, str], dict[str, Any]]) -> PairSample:
        split, name, problem = pair
        uri = pair_uri(self.root, split, name)
        try:
            if problem:
                raise BadSampleError(problem)
            sample = self._sample(uri, split, name, parse_object(read_bytes(uri, small=True)), image_of)
            return checked(sample, self.categories)
        except BadSampleError as error:
            return PairSample(source_uri=uri, pair_id=name, split=split, problem=str(error))

    def _sample(
        self, uri: str, split: str, name: str, pair: dict[str, Any], image_of: Callable[[str, str], dict[str, Any]]
    ) -> PairSample:
        category = needed(pair, "category", str)
        if category not in self.categories:
            raise BadSampleError(f"unknown_category: {category!r} is not one of {', '.join(self.categories)}")
        if pair.get("mirror"):
            raise BadSampleError("mirrored: the source is to be mirrored first, which no published pair asks for")
        annotations = [image_of(category, needed(pair, f"{side}_imname", str)) for side in ("src", "trg")]
        seen = [str(number) for number in needed(pair, "kps_ids", list)]
        ids = sorted({*seen, *_annotated(annotations[0]), *_annotated(annotations[1])}, key=_number)
        source, target = (
            _image(self.root, category, pair, side, annotation, seen, ids)
            for side, annotation in zip(("src", "trg"), annotations, strict=True)
        )
        return PairSample(
            source_uri=uri,
            pair_id=name,
            category=category,
            split=split,
            source=source,
            target=target,
            visible=np.isin(ids, seen),
            flip=flip_by_pairs(ids, self.flip_partners.get(category, [])),
            keypoint_names=tuple(ids),
            viewpoint=_viewpoint(*annotations),
            difficulty={grade: pair[grade] for grade in GRADES if isinstance(pair.get(grade), int)},
        )


def pair_uri(root: str, split: str, name: str) -> str:
    return join(root, "PairAnnotation", split, f"{name}.json")


def _annotation(root: str, category: str, file_name: str) -> dict[str, Any]:
    """The annotation of an image that is there."""
    if "/" in file_name:
        raise BadSampleError(CLIMBS)
    if not file_exists(join(root, _image_id(category, file_name))):
        raise BadSampleError(f"no_image: {_image_id(category, file_name)} is not there")
    name = f"ImageAnnotation/{category}/{file_name.rpartition('.')[0]}.json"
    try:
        return parse_object(read_bytes(join(root, name), small=True))
    except FileNotFoundError:
        raise BadSampleError(f"no_annotation: {name} is not there") from None
    except BadSampleError as error:
        raise BadSampleError(f"{error} ({name})") from None


def _image_id(category: str, file_name: str) -> str:
    return f"JPEGImages/{category}/{file_name}"


def _annotated(annotation: Mapping[str, Any]) -> list[str]:
    return [number for number, place in needed(annotation, "kps", dict).items() if place is not None]


def _number(name: str) -> int:
    if not name.isdecimal():
        raise BadSampleError(f"bad_annotation: the keypoint id {name!r} is no number")
    return int(name)


def _image(
    root: str,
    category: str,
    pair: Mapping[str, Any],
    side: str,
    annotation: Mapping[str, Any],
    seen: list[str],
    ids: list[str],
) -> PairImage:
    places = needed(pair, f"{side}_kps", list)
    if len(places) != len(seen):
        raise BadSampleError(f"bad_annotation: {len(places)} {side}_kps for {len(seen)} kps_ids")
    there = annotation["kps"] | dict(zip(seen, places, strict=True))
    name, (width, height) = pair[f"{side}_imname"], numbers_of(pair.get(f"{side}_imsize"), 3, f"{side}_imsize")[:2]
    left, top, right, bottom = numbers_of(pair.get(f"{side}_bndbox"), 4, f"{side}_bndbox")
    return PairImage(
        image_id=_image_id(category, name),
        uri=join(root, _image_id(category, name)),
        size=(int(width), int(height)),
        box=(left, top, right - left, bottom - top),
        keypoints=points_of([there.get(number) for number in ids], f"{side}_kps") + PIXEL_CENTRE,
    )


def _viewpoint(*annotations: Mapping[str, Any]) -> float | None:
    """Degrees between two of the eight directions from which objects are seen; None when one is not given."""
    views = [view for annotation in annotations if isinstance(view := annotation.get("azimuth_id"), int)]
    if len(views) < len(annotations):
        return None
    apart = (views[0] - views[1]) % VIEWS
    return min(apart, VIEWS - apart) * 360 / VIEWS


def plan_spair(sizes: Sizes, source: PairSource, flips: FlipPartners, rows_per_shard: int) -> list[SpairShard]:
    """Cut the pairs of the layout's lists, in their order, into shards.

    Raises:
        SourceError: there is no such list, or more than one; or a split that SPair-71k does not have.
    """
    if unknown := set(source.splits) - set(SPLITS):
        raise SourceError(f"SPair-71k has no split {sorted(unknown)}. Choose among {', '.join(SPLITS)}.")
    splits = [split for split in SPLITS if split in (source.splits or SPLITS)]
    lists = {split: _list_of(sizes, source, split) for split in splits}
    root = lists[splits[0]].removesuffix(f"/Layout/{source.layout}/{splits[0]}.txt")
    pairs: list[Pair] = []
    for split, uri in lists.items():
        names = [line.strip() for line in read_bytes(uri).decode("utf-8-sig", errors="replace").splitlines()]
        pairs += [(split, name, _problem(sizes, pair_uri(root, split, name))) for name in names if name]
    cuts = range(0, len(pairs), rows_per_shard)
    known = source.categories or CATEGORIES
    return [
        SpairShard(root=root, pairs=tuple(pairs[cut : cut + rows_per_shard]), categories=known, flip_partners=flips)
        for cut in cuts
    ]


def _problem(sizes: Sizes, uri: str) -> str | None:
    return file_problem("no_annotation", uri, sizes, MAX_TEXT_BYTES)


def _list_of(sizes: Sizes, source: PairSource, split: str) -> str:
    name = f"Layout/{source.layout}/{split}.txt"
    found = [uri for uri in sizes if uri.endswith(f"/{name}") and sizes[uri] is not None]
    if len(found) != 1:
        raise SourceError(f"{source.uri!r} has {len(found)} files {name}, not one. Give SPair-71k's own directory.")
    return found[0]
