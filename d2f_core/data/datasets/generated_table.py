"""A table whose parts are generated from their numbers alone, by a Ray Data job.

    OUTPUT/part-NNNNN.parquet          a part is there whole or not at all
    OUTPUT/_progress/job.json          what the job is, until the table is complete; another job is refused
    OUTPUT/manifest.json               written last

Repeating the command keeps the parts that exist, and the finished table is the same byte for byte.
"""

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import ray.data

from d2f_core.data.manifest import (
    Manifest,
    ManifestError,
    TableFile,
    describe_file,
    manifest_exists,
    read_manifest,
    write_manifest,
)
from d2f_core.data.ray_data import configure
from d2f_core.progress import Progress
from d2f_core.storage import join, list_names, read_bytes, remove_tree, write_bytes

PROGRESS = "_progress"


@dataclass(frozen=True, kw_only=True)
class GeneratedTable:
    """What is generated, and how."""

    job: str
    """Name of the job in its progress lines."""
    output: str
    kind: str
    """Kind of the rows, for the manifest."""
    fingerprint: Mapping[str, Any]
    inputs: Mapping[str, Any]
    """All that determines the table's bytes, as JSON values."""
    num_parts: int
    make_part: Callable[[int], TableFile]
    """Writes the part of a number, named `part_name(number)`, in any process; equal numbers give equal bytes."""
    num_tasks: int
    """Parts made at once, one logical CPU each."""
    parts_per_process: int = 0
    """Parts that one process makes before it is replaced; 0: any number."""


def package_versions(packages: Sequence[str], what: str, *, extra: str) -> dict[str, str]:
    """The installed versions, which belong to the inputs of what is generated.

    Args:
        what: is generated, in the plural, for the message.
        extra: of this project, that brings the packages along.

    Raises:
        ValueError: one is not installed.
    """
    try:
        return {name: importlib.metadata.version(name) for name in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"{what} need {error.name}. Install this project with [{extra}].") from None


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def generate_table(table: GeneratedTable) -> tuple[Manifest, bool]:
    """Write the missing parts of the table, then its manifest; needs a running Ray.

    Returns:
        The manifest, and whether anything was written (False: the table was complete).

    Raises:
        ManifestError: the output holds another table, or files that are no table.
    """
    inputs = dict(table.inputs)
    if manifest_exists(table.output):
        manifest = read_manifest(table.output)
        if manifest.inputs != inputs:
            raise ManifestError(
                f"{table.output!r} is a complete table of {manifest.inputs}; asked for {inputs}. Use another output."
            )
        remove_tree(join(table.output, PROGRESS))
        return manifest, False
    _claim(table.output, inputs)
    files = dict(_make_parts(table))
    rows = sum(file.rows for file in files.values())
    manifest = Manifest(
        kind=table.kind,
        files=tuple(files[number] for number in range(table.num_parts)),
        fingerprint=dict(table.fingerprint),
        inputs=inputs,
        counts={"read": rows, "written": rows, "quarantined": 0, "duplicates": 0},
    )
    write_manifest(table.output, manifest)
    remove_tree(join(table.output, PROGRESS))
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


def _make_parts(table: GeneratedTable) -> Iterator[tuple[int, TableFile]]:
    """Number and file of every part, existing parts included, in no fixed order."""
    there = frozenset(list_names(table.output))
    dataset = ray.data.from_items([{"part": number} for number in range(table.num_parts)],
                                  override_num_blocks=table.num_parts)  # fmt: skip
    configure(dataset)

    def make(row: dict[str, Any]) -> dict[str, Any]:
        file = make_or_keep(table, row["part"], there)
        return {"part": row["part"], "file": json.dumps(asdict(file))}

    progress = Progress(table.job, table.num_parts, "parts")
    tasks = cast(Any, ray.data.TaskPoolStrategy(size=table.num_tasks))
    for row in dataset.map(make, compute=tasks, max_calls=table.parts_per_process).iter_rows():
        yield row["part"], TableFile.from_json(json.loads(row["file"]))
        progress.advance(1)


def make_or_keep(table: GeneratedTable, number: int, there: frozenset[str]) -> TableFile:
    """The part of a number: made, or described from its bytes if its name is among those that are `there`, which is
    safe because files appear whole or not at all.
    """
    name = part_name(number)
    if name not in there:
        return table.make_part(number)
    return describe_file(name, read_bytes(join(table.output, name)))
