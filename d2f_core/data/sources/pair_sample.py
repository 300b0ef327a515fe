"""One pair of images that show things of one kind, with keypoints: what each reader of pairs yields, and its columns.

Keypoints are (x, y) in pixels of the upright original image from its upper left corner, with the centre of the first
pixel at (0.5, 0.5): an image of width W spans 0 to W. Both images of a pair list the same keypoints in the same order;
one that an image does not have is NaN there.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from d2f_core.data.errors import BadSampleError
from d2f_core.data.image_headers import BadImageError, read_declared
from d2f_core.data.sources.sample import Sample
from d2f_core.storage import read_bytes

NO_PARTNER = -1
PIXEL_CENTRE = np.float32(0.5)
"""What a pixel's integer index lacks of its centre."""
LEFT_RIGHT = re.compile("left|right")
FLIPPED = {"left": "right", "right": "left"}
SIDEWAYS = 5
"""EXIF orientations from this one on swap width and height."""

POINT, BOX, SIZE = pa.list_(pa.float32(), 2), pa.list_(pa.float32(), 4), pa.list_(pa.int32(), 2)
OF_IMAGES = {"image_id": pa.string(), "size": SIZE, "box": BOX, "keypoints": pa.list_(POINT)}

PAIR_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        *(pa.field(f"source_{name}", kind, nullable=False) for name, kind in OF_IMAGES.items()),
        *(pa.field(f"target_{name}", kind, nullable=False) for name, kind in OF_IMAGES.items()),
        pa.field("source_image", pa.binary()),
        pa.field("target_image", pa.binary()),
        pa.field("visible", pa.list_(pa.bool_()), nullable=False),
        pa.field("flip", pa.list_(pa.int32()), nullable=False),
        pa.field("keypoint_names", pa.list_(pa.string())),
        pa.field("viewpoint", pa.float32()),
        pa.field("difficulty", pa.map_(pa.string(), pa.int32())),
        pa.field("source_uri", pa.string(), nullable=False),
    ]
)
"""One row per pair. Without bytes in `source_image` or `target_image`, its id is the path of the image's file relative
to the directory of images."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PairImage:
    """One image of a pair, and the object in it."""

    image_id: str
    """Its name in the source: its path relative to the directory of images, or a hash of `data`. Two files of pairs may
    use one name for two images: `key` tells these apart."""
    uri: str | None = None
    """Its file; None when `data` holds it."""
    data: bytes | None = None
    size: tuple[int, int]
    """Width and height in pixels, upright."""
    box: tuple[float, ...]
    """x, y, width and height of the object in pixels."""
    keypoints: np.ndarray
    """float32 [keypoints, 2], NaN where the image has none."""

    @cached_property
    def key(self) -> str:
        """Equal for the same image in several pairs, and for no other: its file, or a hash of its bytes."""
        return self.uri if self.uri is not None else content_id(self.data or b"")

    def read(self) -> bytes:
        """The bytes of the image's file. Raises FileNotFoundError when it is gone."""
        return read_bytes(self.uri) if self.uri is not None else self.data or b""


@dataclass(frozen=True, kw_only=True, eq=False)
class PairSample(Sample):
    """One pair as stored in the source; with a `problem`, nothing else can be relied on."""

    image: bytes | None = None
    """Always None, like `caption`: the images are those of `source` and `target`."""
    caption: str | None = None
    pair_id: str | None = None
    category: str = ""
    split: str = ""
    source: PairImage | None = None
    target: PairImage | None = None
    visible: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    """bool [keypoints]: which can be seen in both images, and are trained on and scored."""
    flip: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64 [keypoints]: the keypoint that a mirror swaps each with (left eye and right eye); -1 for none."""
    keypoint_names: tuple[str, ...] | None = None
    viewpoint: float | None = None
    """Angle between the two views in degrees, 0 to 180."""
    difficulty: Mapping[str, int] = field(default_factory=dict)
    """What SPair-71k grades: viewpoint_variation, scale_variation, truncation, occlusion."""


def pair_name(source: PairImage, target: PairImage) -> str:
    """Id of a pair that has none of its own: what its images are called."""
    return f"{source.image_id}:{target.image_id}"


def upright_size(data: bytes) -> tuple[int, int]:
    """Width and height that an image file declares, upright.

    Raises:
        BadImageError: it is no PNG, JPEG or WebP.
    """
    declared = read_declared(data)
    if declared is None:
        raise BadImageError("undecodable: not a PNG, JPEG, WEBP file")
    size = declared.width, declared.height
    return size if declared.orientation < SIDEWAYS else (size[1], size[0])


def content_id(data: bytes) -> str:
    """Id of an image without a name: 32 hex digits of the hash of its bytes."""
    return hashlib.sha256(data).hexdigest()[:32]


def points_of(values: Any, what: str) -> np.ndarray:
    """Lists of x and y, or null -> float32 [points, 2] with NaN for null.

    Raises:
        BadSampleError: `bad_annotation`, when they are anything else.
    """
    try:
        pairs = [(np.nan, np.nan) if value is None else tuple(value) for value in values]
        return np.array(pairs, np.float32).reshape(len(pairs), 2)
    except (TypeError, ValueError, OverflowError):
        raise BadSampleError(f"bad_annotation: {what} is no list of x and y") from None


def numbers_of(values: Any, count: int, what: str) -> tuple[float, ...]:
    """So many finite numbers.

    Raises:
        BadSampleError: `bad_annotation`, when they are anything else.
    """
    try:
        found = () if isinstance(values, str | bytes) else tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        found = ()
    if len(found) != count or not np.isfinite(found).all():
        raise BadSampleError(f"bad_annotation: {what} is {values!r:.60}, not {count} numbers")
    return found


def parse_object(data: bytes | str) -> dict[str, Any]:
    """A JSON object. Raises BadSampleError (`damaged_json`) for anything else."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"damaged_json: {type(error).__name__} in {len(data)} bytes") from None
    if not isinstance(found, dict):
        raise BadSampleError(f"damaged_json: a {type(found).__name__}, not an object")
    return found


def needed(record: Mapping[str, Any], key: str, kind: type) -> Any:
    """The value of a key. Raises BadSampleError (`bad_annotation`) when it is missing or of another type."""
    if not isinstance(value := record.get(key), kind):
        raise BadSampleError(f"bad_annotation: {key} is {value!r:.60}, not a {kind.__name__}")
    return value


def flip_by_name(names: Sequence[str]) -> np.ndarray:
    """Flip partners by the words left and right: `left_eye` and `right_eye`."""
    places = {name.lower(): number for number, name in enumerate(names)}
    swapped = [LEFT_RIGHT.sub(lambda found: FLIPPED[found[0]], name) for name in places]
    partners = [places.get(other, NO_PARTNER) for other in swapped]
    return np.array([NO_PARTNER if other == own else other for own, other in enumerate(partners)], np.int64)


def flip_by_pairs(names: Sequence[str], pairs: Iterable[Sequence[str]]) -> np.ndarray:
    """Flip partners by given pairs of names; -1 where the partner is not among `names`."""
    places = {name: number for number, name in enumerate(names)}
    partner = {a: b for first, second in pairs for a, b in ((first, second), (second, first))}
    return np.array([places.get(partner.get(name, ""), NO_PARTNER) for name in names], np.int64)


def checked(sample: PairSample, categories: Collection[str]) -> PairSample:
    """The sample, whose numbers fit together.

    Raises:
        BadSampleError: `unknown_category`, `bad_annotation`, `no_box`, `outside` or `bad_flip`, with what was found.
    """
    if categories and sample.category not in categories:
        raise BadSampleError(f"unknown_category: {sample.category!r} is not one of {', '.join(sorted(categories))}")
    count = len(sample.visible)
    for name, image in (("source", sample.source), ("target", sample.target)):
        assert image is not None
        if len(image.keypoints) != count:
            raise BadSampleError(f"bad_annotation: {len(image.keypoints)} keypoints of the {name}, {count} of the pair")
        _check_image(name, image)
        if np.isnan(image.keypoints[sample.visible]).any():
            raise BadSampleError(f"bad_annotation: a visible keypoint has no position in the {name}")
    if not _mutual(sample.flip, count):
        raise BadSampleError(
            f"bad_flip: {sample.flip.tolist()} are not each other's partners, or -1, of {count} points"
        )
    return sample


def _mutual(flip: np.ndarray, count: int) -> bool:
    own = np.flatnonzero(flip != NO_PARTNER)
    partners = flip[own]
    within = len(flip) == count and bool(np.isin(partners, np.arange(count)).all())
    return within and bool((flip[partners] == own).all())


def _check_image(name: str, image: PairImage) -> None:
    if not (min(image.box[2:]) > 0 and min(image.size) > 0):
        raise BadSampleError(f"no_box: the box of the {name} is {list(image.box)} of {image.size}: it has no extent")
    (width, height), points = image.size, image.keypoints
    beyond = ((points < 0) | (points > (width, height))).any(1) | np.isinf(points).any(1)
    if beyond.any():
        number = int(beyond.argmax())
        x, y = points[number].tolist()
        raise BadSampleError(f"outside: keypoint {number} of the {name} is at ({x:g}, {y:g}) of {width}x{height} px")


def pairs_to_table(samples: Iterable[PairSample]) -> pa.Table:
    """The columns of `PAIR_SCHEMA` of samples without a problem."""
    return pa.Table.from_pylist([_row(sample) for sample in samples], PAIR_SCHEMA)


def _row(sample: PairSample) -> dict[str, Any]:
    names = ("pair_id", "category", "split", "keypoint_names", "viewpoint", "source_uri")
    row = {name: getattr(sample, name) for name in names} | {"difficulty": list(sample.difficulty.items())}
    row |= {"visible": sample.visible.tolist(), "flip": sample.flip.tolist()}
    for name, image in (("source", sample.source), ("target", sample.target)):
        assert image is not None
        values = (image.image_id, image.size, image.box, image.keypoints.tolist(), image.data)
        columns = [*(f"{name}_{column}" for column in OF_IMAGES), f"{name}_image"]
        row |= dict(zip(columns, values, strict=True))
    return row
