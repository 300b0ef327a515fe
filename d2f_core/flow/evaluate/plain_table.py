"""Reads tables of features for the plain distances, as they are stored: at full width, in float32."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.manifest import Manifest, read_file
from d2f_core.flow.evaluate.plain_distances import PlainPart

BATCH_ROWS = 2048
"""Most rows of a part: 16 MB at 2,048 features, however large the table's files are."""


def read_plain(uri: str, manifest: Manifest, steps: int) -> Iterator[PlainPart]:
    """The parts of a finished feature table for one number of steps (0: real images)."""
    for file in manifest.files:
        data = pq.ParquetFile(pa.BufferReader(read_file(uri, file)))
        for batch in data.iter_batches(BATCH_ROWS, columns=["row", "steps", "features", "clip_features"]):
            rows = batch.filter(pa.array(batch["steps"].to_numpy() == steps))
            if rows.num_rows:
                clip = rows["clip_features"]
                yield PlainPart(
                    rows=rows["row"].to_numpy(),
                    features=_matrix(rows["features"]),
                    clip_features=None if clip.null_count else _matrix(clip),
                )


def _matrix(lists: pa.Array) -> np.ndarray:
    """float32 [rows, width]."""
    return lists.flatten().to_numpy().reshape(len(lists), -1)
