"""Parts a table of images into training and held-out ones, so that images that look alike stay on one side."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.data.datasets.generated_table import part_name
from d2f_core.data.manifest import Manifest, TableFile, read_file, rows_per_group, write_part
from d2f_core.import_images.alike import clusters
from d2f_core.storage import arrow_filesystem, join, retried

Side = Literal["train", "test"]
SIDES: tuple[Side, ...] = ("train", "test")
KNOWN = (
    "sample_id", "source_uri", "caption", "width", "height", "original_width", "original_height", "source_hash",
    "perceptual_hash", "sharpness",
)  # fmt: skip
"""Columns that tell of an image without its bytes."""
READ_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class Parting:
    """Which rows of a table go where."""

    rows: pa.Table
    """The columns `KNOWN` of all rows, in the table's order."""
    cluster: np.ndarray
    """Of each row, the number of the first row that looks like it; int64 [rows]."""
    held_out: np.ndarray
    """Whether a row goes to test/; bool [rows]."""
    dropped: np.ndarray
    """Whether a row goes nowhere, since a larger one looks like it; bool [rows]."""

    def chosen(self, side: Side) -> np.ndarray:
        """Bool [rows]."""
        return (self.held_out == (side == "test")) & ~self.dropped

    @property
    def digest(self) -> str:
        """Of what goes where; with the table, it determines both sides."""
        return hashlib.sha256(self.held_out.tobytes() + self.dropped.tobytes()).hexdigest()[:32]

    @cached_property
    def alike(self) -> list[list[int]]:
        """Numbers of the rows that look alike, a list for each cluster of more than one, the largest picture first."""
        order = np.argsort(self.cluster, kind="stable")
        edges = np.flatnonzero(np.diff(self.cluster[order])) + 1
        groups = [group for group in np.split(order, edges) if len(group) > 1]
        return [sorted(group.tolist(), key=self._by_size) for group in groups]

    def _by_size(self, row: int) -> tuple[int, str]:
        return -int(self._pixels[row]), str(self.rows["sample_id"][row])

    @cached_property
    def _pixels(self) -> np.ndarray:
        return self.rows["original_width"].to_numpy().astype(np.int64) * self.rows["original_height"].to_numpy()

    def alike_lines(self) -> Iterator[str]:
        """The lines of duplicates.jsonl: of each image that looks like a larger one, both, and the bits between."""
        places, hashes = self.rows["source_uri"], self.rows["perceptual_hash"].to_numpy()
        for first, *others in self.alike:
            for other in others:
                yield json.dumps(
                    {
                        "kept": places[first].as_py(),
                        "alike": places[other].as_py(),
                        "bits": int(np.bitwise_count(hashes[first] ^ hashes[other])),
                        "dropped": bool(self.dropped[other]),
                    }
                )


def read_known(uri: str, table: Manifest) -> pa.Table:
    """The columns `KNOWN` of all rows, without reading an image."""
    fs, _ = arrow_filesystem(uri)

    def read(file: TableFile) -> pa.Table:
        path = arrow_filesystem(join(uri, file.path))[1]
        return retried(f"read {file.path}", lambda: pq.read_table(path, columns=list(KNOWN), filesystem=fs))

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return pa.concat_tables(pool.map(read, table.files))


def part_rows(
    rows: pa.Table, *, near_distance: int, held_out_share: float, held_out_least: int = 0, drop: bool = False
) -> Parting:
    """Decide where each row goes: by what the images are, not by their order or the number of machines.

    Args:
        rows: with the columns `KNOWN`.
        near_distance: bits in which the hashes of images that look alike differ at most; -1: all look different.
        held_out_share: of the clusters of images that look alike, those that go to test/.
        held_out_least: images that go there at least: further clusters follow until they are so many, those first that
            are not larger than what is missing.
        drop: of images that look alike, only the largest goes anywhere.
    """
    cluster = clusters(rows["perceptual_hash"].to_numpy(), near_distance)
    dropped = np.zeros(len(cluster), bool)
    parting = Parting(rows=rows, cluster=cluster, held_out=np.zeros_like(dropped), dropped=dropped)
    if drop:
        for _, *others in parting.alike:
            dropped[others] = True
    leaders, place = np.unique(cluster, return_inverse=True)
    hashes: list[str] = rows["source_hash"].to_pylist()  # pyright: ignore[reportAssignmentType]
    smallest = ["g"] * len(leaders)  # above any hexadecimal digit
    for number, name in zip(place.tolist(), hashes, strict=True):
        smallest[number] = min(name, smallest[number])
    chance = np.array([int(name[:13], 16) / 16**13 for name in smallest])
    sizes = np.bincount(place, weights=~dropped, minlength=len(leaders)).astype(int)
    held_out = chance < held_out_share
    least = max(held_out_least, 1 if held_out_share else 0)  # of a handful of images one is held out all the same
    _hold_out_more(held_out, chance, sizes, least)
    return replace(parting, held_out=held_out[place])


def _hold_out_more(held_out: np.ndarray, chance: np.ndarray, sizes: np.ndarray, least: int) -> None:
    """Set further clusters in `held_out`, until they have so many images."""
    missing = least - int(sizes[held_out].sum())
    further = [number for number in np.argsort(chance, kind="stable").tolist() if not held_out[number]]
    for whatever_size in (False, True):
        for number in further:
            if missing > 0 and not held_out[number] and (whatever_size or sizes[number] <= missing):
                held_out[number] = True
                missing -= int(sizes[number])


@dataclass(frozen=True, kw_only=True)
class SidePart:
    """One output file: the rows of some consecutive files of the whole table that go to one side."""

    files: tuple[TableFile, ...]
    chosen: tuple[np.ndarray, ...]
    """Of each file, bool [its rows]."""


def side_parts(table: Manifest, parting: Parting, side: Side, rows_per_part: int) -> list[SidePart]:
    """The files of one side, each of about `rows_per_part` rows, and none of no rows."""
    chosen, first = parting.chosen(side), 0
    parts: list[SidePart] = []
    files: list[TableFile] = []
    picks: list[np.ndarray] = []
    for number, file in enumerate(table.files):
        pick = chosen[first : first + file.rows]
        first += file.rows
        if pick.any():
            files.append(file)
            picks.append(pick)
        count = sum(int(each.sum()) for each in picks)
        if count and (count >= rows_per_part or number + 1 == len(table.files)):
            parts.append(SidePart(files=tuple(files), chosen=tuple(picks)))
            files, picks = [], []
    return parts


def write_side_part(parts: Sequence[SidePart], source: str, output: str, number: int) -> TableFile:
    """Write one file of a side.

    Args:
        parts: all of the side.
        source: URI of the whole table.
    """
    part = parts[number]
    tables = []
    for file, pick in zip(part.files, part.chosen, strict=True):
        tables.append(pq.read_table(pa.BufferReader(read_file(source, file))).filter(pa.array(pick)))
    table = pa.concat_tables(tables)
    group = rows_per_group(table.nbytes // table.num_rows)
    return write_part(output, part_name(number), table, row_group_rows=group)
