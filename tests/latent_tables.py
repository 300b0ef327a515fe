"""Latent tables of random numbers, for tests and benchmarks that train on them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from d2f_core.data.arrays import arrays_to_table
from d2f_core.data.manifest import Manifest, write_manifest, write_part
from d2f_core.flow.latents import latent_schema


def write_latents(
    uri: str,
    fingerprint: str,
    *,
    rows: int,
    rows_per_file: int,
    shape: tuple[int, int, int] = (4, 8, 8),
    pixels: int = 16,
    captions: int,
    properties: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a table of `rows` latents of images `pixels` wide and high, with `captions` different captions.

    Args:
        fingerprint: of the autoencoder that a base model must have to be trained on it.
        properties: what else the table's fingerprint says.
    """
    generator = np.random.default_rng(0)
    columns = {
        "sample_id": [f"{i:032x}" for i in range(rows)],
        "caption": [f"thing {i % captions}" for i in range(rows)],
        "latent_mean": generator.normal(size=(rows, *shape)),
        "latent_std": np.full((rows, *shape), 0.1),
        "bucket": [f"{pixels}x{pixels}"] * rows,
        "source_uri": ["test"] * rows,
        "width": [pixels] * rows,
        "height": [pixels] * rows,
        "crop": [[0, 0, pixels, pixels]] * rows,
    }
    table = arrays_to_table(columns, latent_schema(shape))
    starts = range(0, rows, rows_per_file)
    files = tuple(
        write_part(uri, f"part-{number}.parquet", table.slice(start, rows_per_file))
        for number, start in enumerate(starts)
    )
    found = {"autoencoder": fingerprint, **properties}
    write_manifest(uri, Manifest(kind="latents", files=files, fingerprint=found))
