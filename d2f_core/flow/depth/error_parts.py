"""The errors of every image and predictor as files at an evaluation's output: one per chunk of images, written once.

OUTPUT/measured/KEY/plan.json               what decides the errors; KEY is its hash, so that another comparison at the
                                            same output neither takes nor spoils them
OUTPUT/measured/KEY/mean/part-*.npy         sums of a chunk of the depth that the mean-depth floor is made of
OUTPUT/measured/KEY/mean_depth.npy          that floor
OUTPUT/measured/KEY/errors/part-*.parquet   a row per image and predictor, images in the truth's order
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from d2f_core.batch.output import claim, map_ahead, threads_for
from d2f_core.flow.depth.metrics import METRICS
from d2f_core.flow.depth.protocol import Protocol
from d2f_core.identity import identity_hash
from d2f_core.storage import exists, join, list_names, read_bytes, write_bytes

Array = np.ndarray
MEASURED, ERRORS, SUMS, MEAN = "measured", "errors", "mean", "mean_depth.npy"
NO_MAP = "no map"
SUMS_AHEAD = 4
ROW_BYTES = 8 * len(METRICS)
ERROR_SCHEMA = pa.schema(
    [
        # Row of the truth.
        pa.field("row", pa.int64(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        # Title of the predictions, or name of a floor.
        pa.field("role", pa.string(), nullable=False),
        # Network evaluations of each member; 0 for floors.
        pa.field("evaluations", pa.int32(), nullable=False),
        # Null where the predictor has no map of the image.
        *(pa.field(name, pa.float64()) for name in METRICS),
        # Null where there are errors; otherwise the reason why not.
        pa.field("missing", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ErrorParts:
    """Where the parts are, and how the work is cut; the same for any number of actors."""

    uri: str
    """OUTPUT/measured/KEY."""
    truth: str
    trained_on: str
    """Depth table whose mean is a floor."""
    rows: int
    """Of the truth."""
    trained_rows: int
    rows_per_part: int
    resolution: int
    """Height and width of the mean-depth floor in pixels."""
    protocol: Protocol

    def begin(self, identity: dict[str, Any]) -> None:
        """Claim the place; `identity` is what decides the errors."""
        claim(self.uri, identity)

    @property
    def errors(self) -> str:
        return join(self.uri, ERRORS)

    def chunks(self, rows: int) -> int:
        return -(-rows // self.rows_per_part)

    def chunk(self, number: int, rows: int) -> Array:
        """Row numbers of a chunk."""
        return np.arange(number * self.rows_per_part, min((number + 1) * self.rows_per_part, rows))

    def missing_sums(self) -> list[int]:
        """Chunks of the depth of the floor that are not summed yet; none once the floor is there."""
        if self.has_mean:
            return []
        there = set(list_names(join(self.uri, SUMS)))
        return [number for number in range(self.chunks(self.trained_rows)) if sums_name(number) not in there]

    @property
    def has_mean(self) -> bool:
        return exists(join(self.uri, MEAN))

    def write_mean(self, mean: Array) -> None:
        write_array(join(self.uri, MEAN), mean)

    def read_mean(self) -> Array:
        return decode_array(read_bytes(join(self.uri, MEAN)))

    def missing_parts(self) -> list[int]:
        there = set(list_names(self.errors))
        return [number for number in range(self.chunks(self.rows)) if part_name(number) not in there]

    def write_sums(self, number: int, sums: Array) -> None:
        write_array(join(self.uri, SUMS, sums_name(number)), sums)

    def read_sums(self) -> Array:
        """All sums, added in the order of the chunks: in another order the last bits would be others."""
        places = [join(self.uri, SUMS, sums_name(number)) for number in range(self.chunks(self.trained_rows))]
        total = np.zeros((2, self.resolution, self.resolution))
        for data in map_ahead(read_bytes, places, SUMS_AHEAD):
            total += decode_array(data)
        return total

    def write_part(self, number: int, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        write_bytes(join(self.errors, part_name(number)), sink.getvalue())

    def column(self, name: str, predictors: int) -> Array:
        """A column for every image of the truth and every predictor, [images, predictors]; NaN for null."""

        def read(number: int) -> Array:
            data = pa.BufferReader(read_bytes(join(self.errors, part_name(number))))
            return pq.read_table(data, columns=[name])[name].to_numpy()

        threads = threads_for(ROW_BYTES * predictors * self.rows_per_part)
        parts = list(map_ahead(read, range(self.chunks(self.rows)), threads))
        return np.concatenate(parts).reshape(-1, predictors)


def place_of(output: str, identity: dict[str, Any]) -> str:
    """OUTPUT/measured/KEY of the errors that these JSON values decide."""
    return join(output, MEASURED, identity_hash(identity)[:16])


def error_rows(row: int, sample_id: str, found: Sequence[tuple[str, int, dict[str, float] | None]]) -> pa.Table:
    """The rows of one image.

    Args:
        found: role, evaluations and errors of each predictor; None where it has no map.
    """
    columns: dict[str, Any] = {
        "row": [row] * len(found),
        "sample_id": [sample_id] * len(found),
        "role": [role for role, _, _ in found],
        "evaluations": [evaluations for _, evaluations, _ in found],
        **{name: [errors and errors[name] for _, _, errors in found] for name in METRICS},
        "missing": [None if errors else NO_MAP for _, _, errors in found],
    }
    return pa.table(columns, schema=ERROR_SCHEMA)


def part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def sums_name(number: int) -> str:
    return f"part-{number:06d}.npy"


def write_array(uri: str, values: Array) -> None:
    sink = io.BytesIO()
    np.save(sink, values, allow_pickle=False)
    write_bytes(uri, sink.getvalue())


def decode_array(data: bytes) -> Array:
    """Not for a thread beside others, for the reason that `scorer.MapReader` gives."""
    return np.load(io.BytesIO(data), allow_pickle=False)
