"""Rendered scenes as a depth table; its part N holds the scenes from N * rows_per_part on."""

import io
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from d2f_core.data.datasets.config import MakeDepthConfig
from d2f_core.data.datasets.generated_table import GeneratedTable, generate_table, package_versions, part_name
from d2f_core.data.datasets.scenes import make_scene, render
from d2f_core.data.depth import DEPTH_SCHEMA
from d2f_core.data.depth_files import encode_depth
from d2f_core.data.manifest import Manifest, TableFile, write_part
from d2f_core.data.schema import sample_id

PACKAGES = ("pybullet", "numpy", "pillow")
PARTS_PER_PROCESS = 8
"""Parts that one process makes before it is replaced: PyBullet never frees 3 MB of each scene's meshes."""


def depth_inputs(config: MakeDepthConfig) -> dict[str, Any]:
    """Everything that determines the table's content: the manifest's `inputs`.

    Raises:
        ValueError: pybullet is not installed.
    """
    packages = package_versions(PACKAGES, "Scenes", extra="demo")
    names = ("split", "num_scenes", "size", "seed", "rows_per_part", *["mirrored"] * config.mirrored)
    return {**{name: getattr(config, name) for name in names}, "packages": packages}


def make_depth_dataset(config: MakeDepthConfig) -> tuple[Manifest, bool]:
    """Write the missing parts of the depth table, then its manifest; needs a running Ray.

    Returns:
        The manifest, and whether anything was written (False: the table was complete).

    Raises:
        ManifestError: the output holds another table, or files that are no table.
        ValueError: pybullet is not installed.
    """
    table = GeneratedTable(
        job="make_dataset",
        output=config.output,
        kind="depth",
        fingerprint={"height": config.size, "width": config.size},
        inputs=depth_inputs(config),
        num_parts=config.num_parts,
        make_part=partial(make_part, config),
        num_tasks=config.num_tasks,
        parts_per_process=PARTS_PER_PROCESS,
    )
    return generate_table(table)


def make_part(config: MakeDepthConfig, number: int) -> TableFile:
    """Render and write the scenes of one part."""
    first = number * config.rows_per_part
    scenes = range(first, min(first + config.rows_per_part, config.num_scenes))
    rows = [row for scene in scenes for row in make_rows(config, scene)]
    table = pa.Table.from_pylist(rows, DEPTH_SCHEMA)
    return write_part(config.output, part_name(number), table)


def make_rows(config: MakeDepthConfig, number: int) -> list[dict[str, Any]]:
    """The rows of scene `number`: the scene, and its mirror image if `mirrored` is set."""
    scene = make_scene(config.seed, config.split, number, config.size)
    picture, depth = render(scene, config.size)
    uri = f"rendered:{config.split}/{config.seed}/{config.size}/{number}"
    rows = [_row(picture, depth, uri, scene.text)]
    if config.mirrored:
        rows.append(_row(picture[:, ::-1], depth[:, ::-1], f"{uri}/mirrored", scene.text))
    return rows


def _row(picture: np.ndarray, depth: np.ndarray, uri: str, text: str) -> dict[str, Any]:
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG")
    image = sink.getvalue()
    depth_file = encode_depth(np.ascontiguousarray(depth))
    return {"sample_id": sample_id(image, ""), "image": image, "depth": depth_file, "source_uri": uri, "scene": text}
