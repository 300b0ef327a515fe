"""Small image tables."""

import io

import numpy as np
import pyarrow as pa
from PIL import Image

from d2f_core.data.manifest import Manifest, write_manifest, write_part
from d2f_core.data.schema import IMAGE_SCHEMA


def write_images(uri: str, count: int, side: int = 16) -> str:
    """An image table of noise."""
    draw, rows = np.random.default_rng(0), []
    for number in range(count):
        sink = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(sink, format="PNG")
        rows.append({"sample_id": f"{number:032d}", "caption": "x", "image": sink.getvalue(), "source_uri": "x"})
    file = write_part(uri, "part-0.parquet", pa.Table.from_pylist(rows, IMAGE_SCHEMA))
    write_manifest(uri, Manifest(kind="images", files=(file,)))
    return uri
