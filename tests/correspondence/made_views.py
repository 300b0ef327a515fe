"""A table of views that is made in milliseconds: flat patches, whose colours tell the place, at drawn places."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from d2f_core.data.manifest import Manifest, write_manifest, write_part
from d2f_core.data.schema import array_field
from tests.correspondence.pictures import PLACES, patch

SIDE, POINTS = 48, 16
SCHEMA = pa.schema(
    [
        *(
            pa.field(name, pa.string(), nullable=False)
            for name in ("image_id", "category", "mesh", "split", "source_uri")
        ),
        pa.field("image", pa.binary(), nullable=False),
        *(pa.field(name, pa.int32(), nullable=False) for name in ("width", "height")),
        pa.field("azimuth", pa.float64(), nullable=False),
        array_field("box", "float64", (4,)),
        pa.field("keypoint_names", pa.list_(pa.string()), nullable=False),
        pa.field("keypoints", pa.list_(pa.list_(pa.float64(), 2)), nullable=False),
        pa.field("visible", pa.list_(pa.bool_()), nullable=False),
        pa.field("flip_partners", pa.list_(pa.int32()), nullable=False),
        array_field("surface_points", "float32", (POINTS, 2)),
        array_field("surface_visible", "bool", (POINTS,)),
    ]
)


def write_views(uri: str, *, categories: int = 2, things: int = 4, views: int = 4) -> str:
    """So many things of each category in the split `train`, half as many in `val`; returns the URI."""
    draw, rows = np.random.default_rng(0), []
    for split, count in (("train", things), ("val", max(2, things // 2))):
        for category in range(categories):
            for thing in range(count):
                surface = draw.random((POINTS, 2))
                rows += [_view(draw, split, f"c{category}", thing, view, views, surface) for view in range(views)]
    table = pa.Table.from_pylist(rows, SCHEMA)
    part = write_part(uri, "part-0.parquet", table, row_group_rows=4)
    write_manifest(uri, Manifest(kind="views", files=(part,), fingerprint={"height": SIDE, "width": SIDE}))
    return uri


def _view(draw: np.random.Generator, split: str, category: str, thing: int, view: int, views: int, surface: np.ndarray):
    side = draw.integers(20, 40)
    left, top = draw.integers(0, SIDE - side, 2)
    box = (float(left), float(top), float(side), float(side))
    image = patch((SIDE, SIDE), box, blue=0.2 + 0.1 * thing)
    seen = draw.random(POINTS) < 0.9
    mesh = f"{category}-{split}-{thing}"
    return {
        "image_id": hashlib.sha256(image).hexdigest(),
        "category": category,
        "mesh": mesh,
        "split": split,
        "source_uri": f"made:{mesh}/{view}",
        "image": image,
        "width": SIDE,
        "height": SIDE,
        "azimuth": 360 * (view + draw.random()) / views,
        "box": np.array(box).tobytes(),
        "keypoint_names": ["left eye", "right eye", "nose", "tail"],
        "keypoints": (np.array(PLACES) * side + (left, top)).tolist(),
        "visible": [True, True, True, bool(view % 2)],
        "flip_partners": [1, 0, -1, -1],
        "surface_points": (surface * side + (left, top)).astype(np.float32).tobytes(),
        "surface_visible": seen.tobytes(),
    }


def local_views(path: Path) -> str:
    return write_views(str(path))
