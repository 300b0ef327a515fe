"""The actors of a depth evaluation: they sum the depth of chunks of images, and measure maps against the truth."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from d2f_core.batch.output import map_ahead
from d2f_core.data.depth_files import MAX_DEPTH_PIXELS, decode_depth, decode_npy
from d2f_core.data.manifest import read_manifest
from d2f_core.data.table_reader import RowReader
from d2f_core.flow.depth.config import DepthEvaluationError
from d2f_core.flow.depth.error_parts import ErrorParts, error_rows
from d2f_core.flow.depth.errors import counted, depth_errors, depth_sums, floor_maps, placed
from d2f_core.flow.depth.map_index import MapIndex
from d2f_core.flow.depth.metrics import DepthError
from d2f_core.flow.depth.protocol import Protocol
from d2f_core.storage import read_bytes

Array = np.ndarray
FETCHED_AHEAD = 8
"""Images whose maps are fetched while one is measured."""
FEWEST_PIXELS = 2
"""With a depth that counts; a fit of scale and shift needs so many."""


class DepthSummer:
    """Ray Data actor: a chunk of the floor's depth table -> a file with its sums."""

    def __init__(self, parts: ErrorParts) -> None:
        self._parts = parts
        self._reader = RowReader(parts.trained_on, read_manifest(parts.trained_on), ("depth",))

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Any]:
        number, parts = int(batch["chunk"][0]), self._parts
        rows = self._reader.read(parts.chunk(number, parts.trained_rows))
        truths = (decode_depth(data.as_py()) for data in rows["depth"])
        parts.write_sums(number, depth_sums(truths, parts.resolution, squares=parts.protocol.square))
        return {"chunk": [number]}


class MapReader:
    """Finds and decodes the maps of images, at the size of their truth.

    Files may be fetched in threads, but not decoded there: the header of a .npy file is a Python literal, and Python
    3.11 raises SystemError where two threads parse one at a time (github.com/python/cpython/issues/106905).
    """

    def __init__(self, maps: Sequence[MapIndex], protocol: Protocol) -> None:
        self._maps, self._protocol = maps, protocol
        columns = ("sample_id", "depth_uri")
        self._indices = {one.uri: RowReader(one.uri, read_manifest(one.uri), columns) for one in maps}

    def places(self, sample_ids: Sequence[str]) -> list[list[str | None]]:
        """For each image, the URI of its map by each predictor; None where there is none."""
        return [list(places) for places in zip(*(self._places(one, sample_ids) for one in self._maps), strict=True)]

    def _places(self, maps: MapIndex, sample_ids: Sequence[str]) -> list[str | None]:
        rows = maps.find(sample_ids)
        there = np.flatnonzero(rows >= 0)
        found: list[str | None] = [None] * len(rows)
        if not len(there):
            return found
        index = self._indices[maps.uri].read(rows[there])
        for place, name, uri in zip(
            there.tolist(), index["sample_id"].to_pylist(), index["depth_uri"].to_pylist(), strict=True
        ):
            if name != sample_ids[place]:
                raise DepthEvaluationError(
                    f"the sample ids {name!r} and {sample_ids[place]!r} of {maps.uri!r} have the same key. Leave one "
                    "of the two images out of the evaluation."
                )
            found[place] = uri
        return found

    def decode(self, files: Sequence[bytes | None], shape: tuple[int, int]) -> list[Array | None]:
        """The maps of one image, whose truth has this height and width, from its files."""
        return [
            None if data is None else self._decoded(data, shape, maps)
            for maps, data in zip(self._maps, files, strict=True)
        ]

    def _decoded(self, data: bytes, shape: tuple[int, int], maps: MapIndex) -> Array:
        depth = decode_npy(data, MAX_DEPTH_PIXELS)
        if depth.ndim != 2:
            raise DepthEvaluationError(f"{maps.uri!r} has a map of shape {depth.shape}. Predict again.")
        return placed(depth, shape, of_square=maps.of_squares, protocol=self._protocol)


def fetch(places: Sequence[str | None]) -> list[bytes | None]:
    """The files of one image's maps."""
    return [None if place is None else read_bytes(place) for place in places]


class DepthScorer:
    """Ray Data actor: a chunk of the truth -> a file with the errors of every predictor on its images."""

    def __init__(self, parts: ErrorParts, maps: "Sequence[MapIndex] | ray.ObjectRef[Sequence[MapIndex]]") -> None:
        self._parts = parts
        self._maps: Sequence[MapIndex] = ray.get(maps) if isinstance(maps, ray.ObjectRef) else maps
        self._reader = MapReader(self._maps, parts.protocol)
        self._truth = RowReader(parts.truth, read_manifest(parts.truth), ("sample_id", "depth"))
        self._floors = floor_maps(parts.read_mean())

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Any]:
        number = int(batch["chunk"][0])
        rows = self._parts.chunk(number, self._parts.rows)
        self._parts.write_part(number, pa.concat_tables(self._tables(rows, self._truth.read(rows))))
        return {"chunk": [number]}

    def _tables(self, rows: Array, truth: pa.Table) -> Iterator[pa.Table]:
        names = truth["sample_id"].to_pylist()
        places = self._reader.places(names) if self._maps else [[] for _ in names]
        for image, files in enumerate(map_ahead(fetch, places, FETCHED_AHEAD)):
            depth = decode_depth(truth["depth"][image].as_py())
            try:
                found = self._measured(depth, self._reader.decode(files, depth.shape))
                yield error_rows(int(rows[image]), names[image], found)
            except DepthError as error:
                raise DepthEvaluationError(f"{names[image]} of {self._parts.truth!r}: {error}") from None

    def _measured(self, depth: Array, maps: Sequence[Array | None]) -> list[tuple[str, int, dict[str, float] | None]]:
        protocol = self._parts.protocol
        truth = counted(depth, protocol)
        if (pixels := int(np.isfinite(truth).sum())) < FEWEST_PIXELS:
            raise DepthError(
                f"it has {pixels} pixels with a depth that counts ({protocol.words}); a fit needs {FEWEST_PIXELS}. "
                "Leave it out of the table, or let more of it count."
            )
        floors: list[tuple[str, int, dict[str, float] | None]] = [
            (name, 0, depth_errors(values, truth, protocol)) for name, values in self._floors.items()
        ]
        return floors + [
            (one.role, one.evaluations, None if values is None else depth_errors(values, truth, protocol))
            for one, values in zip(self._maps, maps, strict=True)
        ]
