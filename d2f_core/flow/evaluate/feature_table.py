"""Reads tables of features. Imports no network, so that tasks that only measure start in one second instead of ten."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.manifest import Manifest, read_file
from d2f_core.flow.evaluate.config import MeasureConfig
from d2f_core.flow.evaluate.image_metrics import FeaturePart, ImageSet, gather


def feature_schema(width: int) -> pa.Schema:
    """The columns of a feature table.

    Args:
        width: features per image.
    """
    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("sample_id", pa.string(), nullable=False),
            # Number of solver steps; 0 for real images.
            pa.field("steps", pa.int32(), nullable=False),
            pa.field("features", pa.list_(pa.float32(), width), nullable=False),
            pa.field("caption_score", pa.float64()),
            # CLIP's embedding of the image, not normalised; null without CLIP.
            pa.field("clip_features", pa.list_(pa.float32())),
        ]
    )


def read_features(uri: str, manifest: Manifest, steps: int) -> Iterator[FeaturePart]:
    """The parts of a finished feature table for one number of steps (0: real images)."""
    for file in manifest.files:
        table = pq.read_table(pa.BufferReader(read_file(uri, file)))
        table = table.filter(pa.array(table["steps"].to_numpy() == steps))
        features = table["features"].combine_chunks()
        width = table.schema.field("features").type.list_size
        scores = table["caption_score"]
        yield FeaturePart(
            rows=table["row"].to_numpy(),
            features=features.flatten().to_numpy().reshape(-1, width),
            caption_scores=None if scores.null_count else scores.to_numpy(),
        )


def gather_features(
    uri: str,
    manifest: Manifest,
    steps: int,
    dimensions: int,
    config: MeasureConfig,
    draws: int,
    only: np.ndarray | None,
) -> ImageSet:
    """`image_metrics.gather` over a table's images at one number of steps (0: real images)."""
    parts, total = read_features(uri, manifest, steps), manifest.counts["set"]
    return gather(parts, total=total, dimensions=dimensions, config=config, draws=draws, only=only)
