"""Rendered scenes as a depth table, by a Ray Data job.

    OUTPUT/part-NNNNN.parquet          scenes N * rows_per_part onwards; a part is there whole or not at all
    OUTPUT/_progress/job.json          what the job is, until the table is complete; another job is refused
    OUTPUT/manifest.json               written last

Repeating the command keeps the parts that exist, and the finished table is the same byte for byte.
"""

import importlib.metadata
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray.data
from PIL import Image

from d2f_core.data.datasets.config import MakeDepthConfig
from d2f_core.data.datasets.scenes import make_scene, render
from d2f_core.data.depth import DEPTH_SCHEMA
from d2f_core.data.depth_files import encode_depth
from d2f_core.data.manifest import (
    Manifest,
    ManifestError,
    TableFile,
    describe_file,
    manifest_exists,
    read_manifest,
    write_manifest,
    write_part,
)
from d2f_core.data.ray_data import configure
from d2f_core.data.schema import sample_id
from d2f_core.progress import Progress
from d2f_core.storage import join, list_names, read_bytes, remove_tree, write_bytes

PROGRESS = "_progress"
PACKAGES = ("pybullet", "numpy", "pillow")
PARTS_PER_PROCESS = 8
"""Parts that one process makes before it is replaced: PyBullet never frees 3 MB of each scene's meshes."""

logger = logging.getLogger(__name__)


def depth_inputs(config: MakeDepthConfig) -> dict[str, Any]:
    """Everything that determines the table's content: the manifest's `inputs`.

    Raises:
        ValueError: pybullet is not installed.
    """
    try:
        packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"Scenes need {error.name}. Install this project with [demo].") from None
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
    inputs = depth_inputs(config)
    if manifest_exists(config.output):
        manifest = read_manifest(config.output)
        if manifest.inputs != inputs:
            raise ManifestError(
                f"{config.output!r} is a complete table of {manifest.inputs}; asked for {inputs}. Use another output."
            )
        remove_tree(join(config.output, PROGRESS))
        return manifest, False
    _claim(config.output, inputs)
    files, rows = dict(_make_parts(config)), config.num_scenes * (2 if config.mirrored else 1)
    manifest = Manifest(
        kind="depth",
        files=tuple(files[number] for number in range(config.num_parts)),
        fingerprint={"height": config.size, "width": config.size},
        inputs=inputs,
        counts={"read": rows, "written": rows, "quarantined": 0, "duplicates": 0},
    )
    write_manifest(config.output, manifest)
    remove_tree(join(config.output, PROGRESS))
    return manifest, True


def _claim(output: str, inputs: dict[str, Any]) -> None:
    """Record the job at its output, or check that the job begun there is this one."""
    place = join(output, PROGRESS, "job.json")
    if (names := list_names(output)) and PROGRESS not in names:
        raise ManifestError(f"{output!r} is not empty: it holds {', '.join(names[:5])}. Use another output.")
    try:
        write_bytes(place, json.dumps(inputs, indent=1, sort_keys=True).encode(), exclusive=True)
    except FileExistsError:
        there = json.loads(read_bytes(place))
        if there != inputs:
            raise ManifestError(
                f"{output!r} is an unfinished table of {there}; asked for {inputs}. Use another output, or remove it."
            ) from None


def _make_parts(config: MakeDepthConfig) -> Iterator[tuple[int, TableFile]]:
    """Number and file of every part, existing parts included, in no fixed order."""
    there = frozenset(list_names(config.output))
    items = [{"part": number} for number in range(config.num_parts)]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    configure(dataset)

    def make(row: dict[str, Any]) -> dict[str, Any]:
        number = row["part"]
        file = make_part(config, number) if part_name(number) not in there else _known_part(config.output, number)
        return {"part": number, "file": json.dumps(asdict(file))}

    progress = Progress("make_dataset", config.num_parts, "parts")
    tasks = cast(Any, ray.data.TaskPoolStrategy(size=config.num_tasks))
    for row in dataset.map(make, compute=tasks, max_calls=PARTS_PER_PROCESS).iter_rows():
        yield row["part"], TableFile.from_json(json.loads(row["file"]))
        progress.advance(1)


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


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


def _known_part(output: str, number: int) -> TableFile:
    """The `TableFile` of an existing part, computed from its bytes; safe, as files appear whole or not at all."""
    return describe_file(part_name(number), read_bytes(join(output, part_name(number))))
