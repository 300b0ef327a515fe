"""Where the maps of a prediction are, as arrays: 16 bytes a map, however long the names of its files are.

An evaluation's driver reads a few columns of each index part and keeps a key of the sample id and the row. Its actors
find the rows of their images by these keys, and read the files' names from the index themselves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from pandas.util import hash_array

from d2f_core.batch.output import stream_index
from d2f_core.flow.depth.config import DepthEvaluationError

Array = np.ndarray
COLUMNS = ("sample_id", "steps", "num_evaluations", "error", "resolution", "model_uri")


@dataclass(frozen=True, kw_only=True, eq=False)
class MapIndex:
    """The maps of one output of predict_depth at one number of network evaluations."""

    role: str
    """Title of the output."""
    evaluations: int
    """Network evaluations of each member; the mean where an adaptive solver's vary between batches."""
    steps: int
    uri: str
    """The output."""
    of_squares: bool
    """Whether a map covers only the centre square of its image."""
    resolution: int
    """Long side of the maps in pixels."""
    keys: Array
    """uint64 [maps], ascending: keys of the sample ids."""
    rows: Array
    """int64 [maps]: the map's row of the index."""

    def find(self, sample_ids: Sequence[str]) -> Array:
        """Int64: the index row of each sample's map; -1 where there is none.

        Equal keys do not quite mean equal ids: compare them in the row.
        """
        wanted = id_keys(sample_ids)
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[places] == wanted, self.rows[places], -1)


def id_keys(sample_ids: Sequence[str]) -> Array:
    """A hash of each sample id, uint64: of ten million ids, two share one with a chance of 3 in a million."""
    ids = np.array(sample_ids, dtype=object)
    return hash_array(ids, categorize=False)  # pyright: ignore[reportCallIssue] -- pandas imports it lazily


@dataclass(kw_only=True)
class _Found:
    """What was read of one number of steps."""

    keys: list[Array] = field(default_factory=list)
    rows: list[Array] = field(default_factory=list)
    evaluations: int = 0
    failed: int = 0
    first_error: str = ""

    def add(self, part: pa.Table, rows: Array) -> None:
        """Some rows of one part of the index, and their places in all of it."""
        wrong = part.filter(part["error"].is_valid())
        if wrong.num_rows and not self.failed:
            self.first_error = wrong["error"][0].as_py()
        self.failed += wrong.num_rows
        made = part["error"].is_null()
        good = part.filter(made)
        self.keys.append(id_keys(good["sample_id"].to_pylist()))
        self.rows.append(rows[made.to_numpy()])
        self.evaluations += int(good["num_evaluations"].to_numpy().sum())

    def sorted(self) -> tuple[Array, Array]:
        """Keys in order, each once, and their rows; of the same image in several rows the last."""
        keys, rows = np.concatenate(self.keys), np.concatenate(self.rows)
        order = np.argsort(keys, kind="stable")
        keys, rows = keys[order], rows[order]
        last = np.flatnonzero(np.diff(keys, append=~keys[-1:]))
        return keys[last], rows[last]


def read_maps(uri: str, fingerprint: dict[str, Any], title: str = "") -> tuple[str, list[MapIndex]]:
    """The URI of the model, and the maps by increasing number of steps.

    Args:
        fingerprint: of the output's manifest.
        title: empty: the model's URI.

    Raises:
        DepthEvaluationError: no image has a map at some number of steps.
    """
    found: dict[int, _Found] = {}
    model_uri, resolution, first = "", 0, 0
    for part in stream_index(uri, COLUMNS):
        if not part.num_rows:
            continue
        model_uri = model_uri or part["model_uri"][0].as_py()
        resolution = max(resolution, int(part["resolution"].to_numpy().max()))
        for steps, rows in _by_steps(part):
            found.setdefault(steps, _Found()).add(part.take(rows), first + rows)
        first += part.num_rows
    about = MapIndex(
        role=title or model_uri, evaluations=0, steps=0, uri=uri, resolution=resolution,
        of_squares=fingerprint.get("crop", "square") == "square", keys=np.empty(0), rows=np.empty(0),
    )  # fmt: skip
    return model_uri, [_finished(about, steps, found.pop(steps)) for steps in sorted(found)]


def _by_steps(part: pa.Table) -> Iterator[tuple[int, Array]]:
    """Row numbers within the part, by number of steps."""
    steps = part["steps"].to_numpy()
    for number in np.unique(steps).tolist():
        yield number, np.flatnonzero(steps == number)


def _finished(about: MapIndex, steps: int, found: _Found) -> MapIndex:
    keys, rows = found.sorted()
    if not len(keys):
        raise DepthEvaluationError(
            f"{about.uri!r} has no map at {steps} steps: all {found.failed} failed, the first with "
            f"{found.first_error!r}. Predict again with a model and settings that work."
        )
    count = sum(map(len, found.rows))
    return replace(about, steps=steps, evaluations=round(found.evaluations / count), keys=keys, rows=rows)
