"""Reads tables of features. Imports no network, so that tasks that only measure start in one second instead of ten."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.manifest import Manifest, read_file
from d2f_core.evaluation.estimates import Estimate
from d2f_core.flow.evaluate.config import MeasureConfig
from d2f_core.flow.evaluate.image_metrics import FeaturePart, ImageSet, gather, noise_floor
from d2f_core.flow.evaluate.memorisation import Memorisation, nearest_training
from d2f_core.flow.evaluate.projection import project

Place = tuple[str, Manifest, int]
"""URI and manifest of a feature table, and the number of steps (0: real images)."""


class KnownRows(NamedTuple):
    """Sample ids by what a training knew of them."""

    held_out: np.ndarray
    """Rows of the training's table that it held out."""
    overlap: np.ndarray
    """Rows of the reference that it was trained on."""


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


def read_features(uri: str, manifest: Manifest, steps: int, dimensions: int = 0) -> Iterator[FeaturePart]:
    """The parts of a finished feature table for one number of steps (0: real images).

    Args:
        dimensions: features are projected onto so many directions; 0: all of the network's.
    """
    for file in manifest.files:
        table = pq.read_table(pa.BufferReader(read_file(uri, file)))
        table = table.filter(pa.array(table["steps"].to_numpy() == steps))
        features = table["features"].combine_chunks()
        width = table.schema.field("features").type.list_size
        scores = table["caption_score"]
        yield FeaturePart(
            rows=table["row"].to_numpy(),
            features=project(features.flatten().to_numpy().reshape(-1, width), dimensions),
            caption_scores=None if scores.null_count else scores.to_numpy(),
            sample_ids=table["sample_id"].to_numpy(),
        )


def usable_rows(uri: str, manifest: Manifest, steps: int) -> np.ndarray:
    """Bool [images in the set]: which have features at one number of steps (0: real images)."""
    usable = np.zeros(manifest.counts["set"], bool)
    for file in manifest.files:
        table = pq.read_table(pa.BufferReader(read_file(uri, file)), columns=["row", "steps"])
        usable[table["row"].to_numpy()[table["steps"].to_numpy() == steps]] = True
    return usable


def floor_of(place: Place, dimensions: int, made: int, config: MeasureConfig) -> dict[str, Estimate]:
    """`image_metrics.noise_floor` of a table's images."""
    parts = read_features(*place, dimensions)
    return noise_floor(parts, total=place[1].counts["set"], made=made, config=config)


def memorised(
    made: Place, training: Place, reference: Place, known: KnownRows, dimensions: int, config: MeasureConfig
) -> Memorisation | str:
    """Whether generated images repeat those of a training table; a text says why that cannot be tested."""
    (_, drawn), (ids, trained), (others, held) = (
        _sampled(place, dimensions, most)
        for place, most in (
            (made, config.pairwise_rows),
            (training, config.paired_rows),
            (reference, config.paired_rows),
        )
    )
    trained, held = trained[~np.isin(ids, known.held_out)], held[~np.isin(others, known.overlap)]
    if not len(held):
        return "all images of the reference were trained on"
    if not len(drawn) or not len(trained):
        return "there is no image to compare"
    return nearest_training(drawn, trained, held)


def _sampled(place: Place, dimensions: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids and features of about `most` of a table's images at most, chosen at random."""
    total = place[1].counts["set"]
    there = min(total, place[1].counts["images"])  # of a table of some files of its source only
    chosen = np.random.Generator(np.random.Philox(0)).permutation(total) < most * total / max(1, there)
    ids, features = [np.empty(0, object)], [np.empty((0, 1))]
    for part in read_features(*place, dimensions):
        mask = chosen[part.rows]
        assert part.sample_ids is not None  # `read_features` gives them
        ids.append(part.sample_ids[mask])
        features.append(part.features[mask])
    return np.concatenate(ids), np.concatenate(features[1:] or features)


def gather_features(
    place: Place, dimensions: int, config: MeasureConfig, draws: int, only: np.ndarray | None
) -> ImageSet:
    """`image_metrics.gather` over a table's images."""
    parts, total = read_features(*place, dimensions), place[1].counts["set"]
    return gather(parts, total=total, dimensions=dimensions, config=config, draws=draws, only=only)
