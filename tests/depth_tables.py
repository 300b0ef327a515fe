"""Small depth tables and depth latent tables, for tests that train on them or compare with them."""

import io
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from d2f_core.data.arrays import arrays_to_table
from d2f_core.data.depth import DEPTH_SCHEMA
from d2f_core.data.depth_files import encode_depth
from d2f_core.data.manifest import Manifest, write_manifest, write_part
from d2f_core.data.schema import sample_id
from d2f_core.flow.depth.actor import DEPTH_INDEX_SCHEMA
from d2f_core.flow.latents import DEPTH_TASK, depth_latent_schema
from d2f_core.storage import join, write_bytes


def picture(seed: int, height: int = 16, width: int = 20) -> bytes:
    """A PNG of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="PNG")
    return sink.getvalue()


def true_depth(seed: int, height: int = 16, width: int = 20) -> np.ndarray:
    """A tilted plane with a hole and a nearer box, in metres."""
    generator = np.random.default_rng(seed)
    depth = np.add.outer(np.linspace(6, 3, height), generator.uniform(-1, 1) * np.linspace(0, 2, width)) + 2
    top, left = generator.integers(0, height - 6), generator.integers(2, width - 8)
    depth[top : top + 5, left : left + 5] -= 1.5
    depth[:2, :6] = np.nan
    return depth.astype(np.float32)


def write_depth_table(uri: str, rows: int, *, first_seed: int = 0, depth: np.ndarray | None = None) -> list[str]:
    """Write a depth table, of the same depth in all rows if one is given; returns its sample ids."""
    images = [picture(first_seed + row) for row in range(rows)]
    names = [sample_id(image, "") for image in images]
    columns = {
        "sample_id": names,
        "image": images,
        "depth": [encode_depth(true_depth(first_seed + row) if depth is None else depth) for row in range(rows)],
        "source_uri": [f"test#{row}" for row in range(rows)],
        "scene": ["a box on a plane"] * rows,
    }
    part = write_part(uri, "part-000000.parquet", arrays_to_table(columns, DEPTH_SCHEMA))
    write_manifest(uri, Manifest(kind="depth", files=(part,)))
    return names


def write_predictions(
    uri: str,
    maps: Mapping[str, Mapping[int, np.ndarray | None]],
    *,
    model_uri: str = "a/model",
    rows_per_part: int = 4,
    evaluations: Mapping[str, int] = MappingProxyType({}),
    **fingerprint: Any,
) -> str:
    """A finished output of predict_depth.

    Args:
        maps: by sample id and number of steps; None: it failed.
        evaluations: network evaluations by sample id, where they are not the number of steps.
        fingerprint: settings of the output beside its task; without `crop`, maps are of centre squares.
    """
    settings = {"solver": "euler", "shift": 1.0, "ensemble": 1, "seed": 0, "crop": "square", **fingerprint}
    parts, names = [], list(maps)
    for number, start in enumerate(range(0, len(names), rows_per_part)):
        rows = []
        for steps in sorted({steps for by_steps in maps.values() for steps in by_steps}):
            for name in names[start : start + rows_per_part]:
                depth = maps[name][steps]
                row = {"sample_id": name, "source_uri": "x", "resolution": 16, "steps": steps, "model_uri": model_uri}
                row |= {"model_hash": "h", "num_evaluations": evaluations.get(name, steps), **settings}
                del row["crop"]
                if depth is None:
                    rows.append(row | {"error": "the depth is not finite"})
                    continue
                place = join(uri, f"depth/{name}-{steps}.npy")
                write_bytes(place, encode_map(depth))
                rows.append(row | {"depth_uri": place})
        schema = pa.schema([field for field in DEPTH_INDEX_SCHEMA if field.name in {*rows[0], "depth_uri", "error"}])
        parts.append(write_part(uri, f"index/part-{number:06d}.parquet", pa.Table.from_pylist(rows, schema)))
    fingerprint = {"task": "image_to_depth", **settings}
    if fingerprint["crop"] == "square":
        del fingerprint["crop"]
    write_manifest(uri, Manifest(kind="generations", files=tuple(parts), fingerprint=fingerprint))
    return uri


def encode_map(depth: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, depth.astype(np.float32))
    return sink.getvalue()


def write_depth_latents(uri: str, fingerprint: str, *, rows: int, shape: tuple[int, int, int] = (4, 8, 8)) -> None:
    """Write a depth latent table of random numbers.

    Args:
        fingerprint: of the autoencoder that a base model must have to be trained on it.
    """
    generator = np.random.default_rng(0)
    mask = np.ones((rows, 1, *shape[1:]), np.uint8)
    mask[..., 0] = 0
    columns = {
        "sample_id": [f"{row:032x}" for row in range(rows)],
        "caption": [""] * rows,
        "latent_mean": generator.normal(size=(rows, *shape)),
        "latent_std": np.full((rows, *shape), 0.1),
        "bucket": ["16x16"] * rows,
        "source_uri": ["test"] * rows,
        "width": [16] * rows,
        "height": [16] * rows,
        "crop": [[0, 0, 16, 16]] * rows,
        "joined_mean": generator.normal(size=(rows, *shape)),
        "mask": mask,
    }
    part = write_part(uri, "part-0.parquet", arrays_to_table(columns, depth_latent_schema(shape)))
    prints = {"autoencoder": fingerprint, "task": DEPTH_TASK}
    write_manifest(uri, Manifest(kind="latents", files=(part,), fingerprint=prints))
