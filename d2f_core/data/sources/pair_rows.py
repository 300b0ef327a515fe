"""Pairs of one's own: a parquet row or a line of JSON each, under the names of `pair_sample.PAIR_SCHEMA`.

    {"source_image_id": "a.jpg", "target_image_id": "b.jpg", "category": "chair",
     "source_keypoints": [[12.5, 40.0], [80.5, 41.5]], "target_keypoints": [[30.5, 22.0], null],
     "source_box": [10, 20, 90, 120], "target_box": [12, 9, 60, 80], "keypoint_names": ["left arm", "right arm"]}

Those are what a pair needs, names aside. Keypoints lie where `pair_sample` says: whoever has integer indices of pixels
adds 0.5. What is missing is taken as follows. `pair_id`: the ids of both images. `split`: empty. `visible`: the
keypoints that both images have. `flip`: by the names. Sizes: as the images' files declare. Images are files named by
their ids, or in parquet the bytes of `source_image` and `target_image`, whose ids may then be missing.

Where points are not asked for (`RowRules.points`), a pair needs its two images only, and its points are not looked at.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from d2f_core.data.errors import BadSampleError
from d2f_core.data.image_headers import MAX_IMAGE_BYTES, too_large
from d2f_core.data.sources.pair_sample import (
    NO_PARTNER,
    PAIR_SCHEMA,
    PairImage,
    PairSample,
    checked,
    content_id,
    flip_by_name,
    flip_by_pairs,
    needed,
    numbers_of,
    pair_name,
    parse_object,
    points_of,
    upright_size,
)
from d2f_core.data.sources.parquet_rows import DamagedFileError, RowRun, describe, plan_rows, text_of
from d2f_core.data.sources.sample import SourceError
from d2f_core.data.sources.tar import CLIMBS, climbs
from d2f_core.storage import file_exists, join, read_bytes

NEEDED = ("category", "source_keypoints", "target_keypoints", "source_box", "target_box")
POINTS = ("source_keypoints", "target_keypoints", "source_box", "target_box", "visible", "flip", "keypoint_names")
TEXTS = ("pair_id", "category", "split", "source_image_id", "target_image_id")


@dataclass(frozen=True, kw_only=True)
class RowRules:
    """How the rows of a source are read."""

    images: str | None
    categories: tuple[str, ...]
    splits: tuple[str, ...]
    flip_partners: Mapping[str, list[list[str]]]
    points: bool = True
    """Whether keypoints, boxes and categories are needed. False: a pair has no keypoints, its boxes are whole images,
    and its category is empty where none is given."""


class RowReader:
    """Rows of one file -> samples; an image that several rows name is looked up once."""

    def __init__(self, uri: str, rules: RowRules) -> None:
        self.folder, self.rules = rules.images or uri.rpartition("/")[0], rules
        self._there: dict[str, bool] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def sample(self, place: str, record: Mapping[str, Any]) -> PairSample | None:
        """One row's pair, or why there is none; None when it is of a split that was not asked for."""
        split = record.get("split") or ""
        if self.rules.splits and split not in self.rules.splits:
            return None
        try:
            return checked(self._pair(place, str(split), record), self.rules.categories)
        except BadSampleError as error:
            return PairSample(source_uri=place, pair_id=None, split=str(split), problem=str(error))

    def _pair(self, place: str, split: str, record: Mapping[str, Any]) -> PairSample:
        if not self.rules.points:
            kept = {name: value for name, value in record.items() if name not in POINTS and value is not None}
            record = {"category": ""} | kept
        source, target = (self._image(record, side) for side in ("source", "target"))
        category, names = needed(record, "category", str), record.get("keypoint_names")
        viewpoint = record.get("viewpoint")
        return PairSample(
            source_uri=place,
            pair_id=str(record.get("pair_id") or pair_name(source, target)),
            category=category,
            split=split,
            source=source,
            target=target,
            visible=_visible(record.get("visible"), source.keypoints, target.keypoints),
            flip=self._flip(record, category, names, len(source.keypoints)),
            keypoint_names=None if names is None else tuple(str(name) for name in names),
            viewpoint=None if viewpoint is None else numbers_of([viewpoint], 1, "viewpoint")[0],
            difficulty=_grades(record.get("difficulty")),
        )

    def _flip(self, record: Mapping[str, Any], category: str, names: Any, count: int) -> np.ndarray:
        if record.get("flip") is not None:
            return np.array(numbers_of(record["flip"], count, "flip"), np.int64)
        if names is None:
            return np.full(count, NO_PARTNER)
        if not isinstance(names, list) or len(names) != count:
            raise BadSampleError(f"bad_annotation: keypoint_names is {names!r:.60}, not {count} names")
        names = [str(name) for name in names]
        pairs = self.rules.flip_partners.get(category)
        return flip_by_name(names) if pairs is None else flip_by_pairs(names, pairs)

    def _image(self, record: Mapping[str, Any], side: str) -> PairImage:
        data, name = record.get(f"{side}_image"), record.get(f"{side}_image_id")
        told = record.get(f"{side}_size")
        size = None if told is None else numbers_of(told, 2, f"{side}_size")
        if data is None:
            uri = self._uri(needed(record, f"{side}_image_id", str))
            declared = self._size(uri) if size is None else size
        elif len(data) > MAX_IMAGE_BYTES:
            raise BadSampleError(f"{too_large(len(data), MAX_IMAGE_BYTES)} ({side}_image)")
        else:
            uri, declared = None, upright_size(data)
        if size not in (None, declared):
            raise BadSampleError(f"bad_annotation: {side}_size is {told}, its file is {declared[0]}x{declared[1]} px")
        width, height = int(declared[0]), int(declared[1])
        whole, points = (0.0, 0.0, float(width), float(height)), self.rules.points
        return PairImage(
            image_id=str(name) if name else content_id(data or b""),
            uri=uri,
            data=data,
            size=(width, height),
            box=numbers_of(record.get(f"{side}_box"), 4, f"{side}_box") if points else whole,
            keypoints=points_of(record.get(f"{side}_keypoints") if points else (), f"{side}_keypoints"),
        )

    def _uri(self, name: str) -> str:
        if climbs(name) or name.startswith("/"):
            raise BadSampleError(CLIMBS)
        uri = join(self.folder, name)
        if uri not in self._there:
            self._there[uri] = file_exists(uri)
        if not self._there[uri]:
            raise BadSampleError(f"no_image: {name} is not there")
        return uri

    def _size(self, uri: str) -> tuple[int, int]:
        if uri not in self._sizes:
            self._sizes[uri] = upright_size(read_bytes(uri))
        return self._sizes[uri]


def _visible(given: Any, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    if len(source) != len(target):
        raise BadSampleError(f"bad_annotation: {len(source)} keypoints of the source, {len(target)} of the target")
    if given is None:
        return np.asarray(np.isfinite(np.hstack([source, target])).all(axis=1))
    if not isinstance(given, list) or not all(isinstance(value, bool) for value in given):
        raise BadSampleError(f"bad_annotation: visible is {given!r:.60}, not a list of true and false")
    return np.array(given, bool)


def _grades(given: Any) -> dict[str, int]:
    try:
        return {str(name): int(grade) for name, grade in dict(given or ()).items()}
    except (TypeError, ValueError):
        raise BadSampleError(f"bad_annotation: difficulty is {given!r:.60}, not an object of numbers") from None


@dataclass(frozen=True, kw_only=True)
class PairTableShard:
    run: RowRun
    rules: RowRules

    @property
    def num_rows(self) -> int | None:
        return None if self.rules.splits else self.run.num_rows

    def read(self) -> Iterator[PairSample]:
        reader = RowReader(self.run.uri, self.rules)
        try:
            for place, record in self.run.read():
                texts = {name: text_of(record[name]) for name in TEXTS if isinstance(record.get(name), bytes)}
                if sample := reader.sample(place, record | texts):
                    yield sample
        except DamagedFileError as error:
            yield PairSample(source_uri=self.run.uri, problem=str(error), rows=error.rows)


@dataclass(frozen=True, kw_only=True)
class PairLinesShard:
    """One file of JSON lines."""

    uri: str
    rules: RowRules

    @property
    def num_rows(self) -> None:
        return None

    def read(self) -> Iterator[PairSample]:
        reader = RowReader(self.uri, self.rules)
        for number, line in enumerate(read_bytes(self.uri).split(b"\n"), start=1):
            if not line.strip():
                continue
            place = f"{self.uri}#line={number}"
            try:
                record = parse_object(line)
            except BadSampleError as error:
                yield PairSample(source_uri=place, problem=str(error))
                continue
            record |= dict.fromkeys(("source_image", "target_image"))  # bytes, which JSON has not
            if sample := reader.sample(place, record):
                yield sample


def plan_pair_tables(files: Collection[str], rules: RowRules, rows_per_shard: int) -> list[PairTableShard]:
    """Cut the parquet files among `files` into runs of about `rows_per_shard` rows.

    Raises:
        SourceError: a file lacks a column that every pair needs.
    """
    wanted, unread = (NEEDED, ()) if rules.points else ((), POINTS)

    def columns(uri: str, schema: pa.Schema) -> list[str]:
        images = [{f"{side}_image", f"{side}_image_id"} & set(schema.names) for side in ("source", "target")]
        if not (set(wanted) <= set(schema.names) and all(images)):
            named = f"{', '.join(wanted)}, and " if wanted else ""
            raise SourceError(
                f"{uri!r} is no table of pairs. It needs {named}an image or image_id of source and target; its "
                f"columns: {describe(schema)}."
            )
        return [name for name in PAIR_SCHEMA.names if name in schema.names and name not in ("source_uri", *unread)]

    return [PairTableShard(run=run, rules=rules) for run in plan_rows(files, columns, rows_per_shard)]


def plan_pair_lines(files: Collection[str], rules: RowRules) -> list[PairLinesShard]:
    """One shard per file of JSON lines among `files`, sorted by name."""
    return [PairLinesShard(uri=uri, rules=rules) for uri in sorted(files) if uri.endswith(".jsonl")]
