"""Pairs of rendered views: different things of one category, as many at each angle between the views."""

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from d2f_core.data.manifest import read_file, read_manifest
from d2f_core.data.sources.pair_sample import PairImage, PairSample
from d2f_core.randomness import keyed_generator

COLUMNS = (
    "image_id", "image", "width", "height", "category", "mesh", "split", "azimuth", "box", "keypoint_names",
    "keypoints", "visible", "flip_partners", "source_uri",
)  # fmt: skip
EDGES = (0, 30, 60, 120, 180)
"""Of the ranges of the angle between two views, in degrees around the vertical."""
LEAST_KEYPOINTS = 3
"""That both views of a pair must show."""


def read_views(uri: str, split: str) -> list[dict[str, Any]]:
    """The rows of a split of a table of views, in its order."""
    rows = []
    for file in read_manifest(uri).files:
        table = pq.read_table(io.BytesIO(read_file(uri, file)), columns=list(COLUMNS))
        rows += [row for row in table.to_pylist() if row["split"] == split]
    return rows


def pairs_of_views(
    views: Sequence[Mapping[str, Any]], *, per_range: int, seed: int = 0, edges: Sequence[float] = EDGES
) -> list[PairSample]:
    """Pairs of views of two things of one category, at most `per_range` in each range of angles of each category.

    They are drawn from `seed`; a pair shows at least `LEAST_KEYPOINTS` keypoints in both views.
    """
    by_category = defaultdict(list)
    for view in views:
        by_category[view["category"]].append(view)
    return [
        pair
        for category, members in sorted(by_category.items())
        for pair in _of_category(members, per_range, keyed_generator(seed, category, "pairs of views"), edges)
    ]


def _of_category(
    views: Sequence[Mapping[str, Any]], per_range: int, draw: np.random.Generator, edges: Sequence[float]
) -> Iterator[PairSample]:
    left = dict.fromkeys(range(len(edges) - 1), per_range)
    order = draw.permutation(len(views) ** 2)
    for number in order.tolist():
        source, target = views[number // len(views)], views[number % len(views)]
        if not any(left.values()):
            return
        angle = angle_between(source["azimuth"], target["azimuth"])
        place = min(int(np.searchsorted(edges, angle, side="right")) - 1, len(edges) - 2)
        if source["mesh"] == target["mesh"] or not left[place]:
            continue
        seen = np.array(source["visible"]) & np.array(target["visible"])
        if seen.sum() >= LEAST_KEYPOINTS:
            left[place] -= 1
            yield _pair(source, target, seen, angle)


def angle_between(first: float, second: float) -> float:
    """Of two directions in degrees, from 0 to 180."""
    apart = abs(first - second) % 360
    return min(apart, 360 - apart)


def _pair(source: Mapping[str, Any], target: Mapping[str, Any], seen: np.ndarray, angle: float) -> PairSample:
    return PairSample(
        source_uri=f"{source['source_uri']} {target['source_uri']}",
        pair_id=f"{source['image_id'][:16]}-{target['image_id'][:16]}",
        category=source["category"],
        split=source["split"],
        source=_image(source),
        target=_image(target),
        visible=seen,
        flip=np.array(source["flip_partners"], np.int64),
        keypoint_names=tuple(source["keypoint_names"]),
        viewpoint=angle,
    )


def _image(view: Mapping[str, Any]) -> PairImage:
    box = np.frombuffer(view["box"], np.float64)
    return PairImage(
        image_id=view["image_id"],
        data=view["image"],
        size=(view["width"], view["height"]),
        box=tuple(box.tolist()),
        keypoints=np.where(
            np.array(view["visible"])[:, None], np.array(view["keypoints"], np.float32).reshape(-1, 2), np.nan
        ),  # as readers of photographs have it: nobody marks what is hidden
    )
