"""A table of features without a teacher: what `embed_images` writes, of drawn numbers."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from d2f_core.data.arrays import arrays_to_table
from d2f_core.data.manifest import Manifest, write_manifest, write_part
from d2f_core.data.quarantine import BadSample, write_quarantine
from d2f_core.data.schema import array_field

SIZE, POINTS = 28, 16
BROKEN = "f" * 32
"""Id of an image that is in the table's ledger."""
SHAPES = {"features_a": (16, 5), "features_b": (4, 7)}


def write_features(
    uri: str,
    *,
    categories: int = 2,
    things: int = 3,
    views: int = 4,
    points: int = POINTS,
    kind: str = "features",
    embedding: bool = False,
    known: Mapping[int, tuple[str, str]] | None = None,
) -> str:
    """The rows of a category, and of a thing in it, follow one another.

    Args:
        known: row -> file and id of its image, in place of drawn-up ones.
    """
    draw, count = np.random.default_rng(0), categories * things * views
    arrays: dict[str, np.ndarray] = {"pixels": draw.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)}
    if points:
        arrays["surface_points"] = draw.uniform(0, SIZE, (count, points, 2)).astype(np.float32)
        arrays["surface_visible"] = draw.random((count, points)) < 0.9
    arrays |= {name: draw.standard_normal((count, *shape)).astype(np.float16) for name, shape in SHAPES.items()}
    if embedding:
        arrays["embedding"] = draw.standard_normal((count, 5)).astype(np.float16)
    names = [f"c{row // (things * views)}" for row in range(count)]
    texts = {
        "sample_id": [f"{row:032x}" for row in range(count)],
        "source_uri": [f"made:{row}" for row in range(count)],
        "category": names,
        "mesh": [f"{name}-{row // views % things}" if points else "" for row, name in enumerate(names)],
    }
    for row, (place, name) in (known or {}).items():
        texts["source_uri"][row], texts["sample_id"][row] = place, name
    fields = [pa.field(name, pa.string(), nullable=False) for name in texts]
    fields += [array_field(name, values.dtype.name, values.shape[1:]) for name, values in arrays.items()]
    table = arrays_to_table({**texts, **arrays}, pa.schema(fields))
    part = write_part(uri, "part-0.parquet", table, row_group_rows=4)
    shapes = {name: list(shape) for name, shape in SHAPES.items()}
    fingerprint = {"size": SIZE, "teachers": {name: {"weights": "made"} for name in SHAPES}, "shapes": shapes}
    fingerprint |= {"points": points} | ({"embedding": {"of": "features_a", "pooling": "class"}} if embedding else {})
    write_quarantine(uri, [BadSample(source_uri="made:broken", sample_id=BROKEN, reason="too_small: 1x1 px")])
    write_manifest(uri, Manifest(kind=kind, files=(part,), fingerprint=fingerprint))
    return uri
