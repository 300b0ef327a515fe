"""What an encode job is. Light: the tasks that read and write import this, and neither torch nor a model."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from d2f_core.batch.config import AwaitedPoolConfig
from d2f_core.data.image_rules import MAX_PIXELS_LIMIT, ImageRules
from d2f_core.data.sources.config import DepthSource, ImageSource

if TYPE_CHECKING:
    import pyarrow as pa

MAX_CHUNK_BYTES = 512 * 2**20
"""Pixels of one chunk, which travel between tasks in one piece."""


class EncodeError(ValueError):
    """An encode job that cannot run as asked, with the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class EncodeWork:
    """By what images are encoded, which are accepted, and in which pieces."""

    base: str = ""
    """Base model whose autoencoder (and text encoder) is used: a directory, s3:// prefix or hub id."""
    output: str = ""
    """Where the latent table is written; the same command again resumes, and does nothing once it is complete."""
    resolution: int = 64
    """Height and width in pixels that every image is cropped and resized to."""
    min_side: int | None = None
    """Smallest accepted short side in pixels; None: the resolution, so that no image is enlarged."""
    max_pixels: int = 50_000_000
    """Largest accepted width x height of an image file."""
    max_quarantined_share: float = 0.01
    """Share of the samples that may be unusable before the job stops; duplicates do not count. A job that was stopped
    goes on with a higher one."""
    rows_per_part: int = 256
    """Samples per output file: what a killed task loses at most."""
    batch_size: int = 16
    """Images per forward pass of the autoencoder."""
    num_readers: int = 2
    """Tasks that read and decode at a time; raise it until the actors never wait."""


@dataclass(frozen=True, kw_only=True)
class EncodeSettings(AwaitedPoolConfig, EncodeWork):
    """What every encode job can be told; the job's own config adds its source."""

    BYTES_PER_PIXEL: ClassVar[int] = 3
    """Of one sample's pictures on their way to the actors."""

    num_actors: int = 2
    """Processes that hold the autoencoder."""

    def __post_init__(self) -> None:
        self.check_counts("resolution", "rows_per_part", "batch_size", "num_readers", error=EncodeError)
        if self.min_side is not None and self.min_side < 1:
            raise EncodeError(f"min_side={self.min_side} must be at least 1 pixel, or None for the resolution.")
        if not 1 <= self.max_pixels <= MAX_PIXELS_LIMIT:
            raise EncodeError(f"max_pixels={self.max_pixels} must be between 1 and {MAX_PIXELS_LIMIT}.")
        if not 0 <= self.max_quarantined_share <= 1:
            raise EncodeError(f"max_quarantined_share={self.max_quarantined_share} must lie in [0, 1]. Use 0.01.")
        rows = MAX_CHUNK_BYTES // (self.BYTES_PER_PIXEL * self.resolution**2)
        if self.rows_per_part > rows:
            raise EncodeError(
                f"rows_per_part={self.rows_per_part} images of {self.resolution} pixels are more than "
                f"{MAX_CHUNK_BYTES >> 20} MiB in one piece. Most that fits: {rows}."
            )

    @property
    def rules(self) -> ImageRules:
        min_side = self.resolution if self.min_side is None else self.min_side
        return ImageRules(resolution=self.resolution, min_side=min_side, max_pixels=self.max_pixels)


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(EncodeSettings):
    source: ImageSource = field(default_factory=ImageSource)
    """Captioned images."""
    text: Literal["online", "states"] = "online"
    """`online`: captions are encoded during training. `states`: text states are stored, some 5 times the bytes."""


@dataclass(frozen=True, kw_only=True)
class EncodeDepthConfig(EncodeSettings):
    BYTES_PER_PIXEL: ClassVar[int] = 7

    source: DepthSource = field(default_factory=DepthSource)
    """Images with depth."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What an actor encodes of each sample."""

    name: str
    """Column in which it comes: uint8 [height, width, 3], or float32 [height, width] in [-1, 1], which is encoded as
    three equal channels."""
    dtype: Literal["uint8", "float32"]
    mean: str
    """Column of the table for the scaled latent's mean."""
    std: str | None
    """Column for its deviation; None leaves it out."""


@dataclass(frozen=True, kw_only=True)
class EncodeKind:
    """What differs between jobs: the kind of their samples. The functions are a module's own, found by name on every
    node, and of modules as light as this one."""

    schema: "Callable[[tuple[int, int, int]], pa.Schema]"
    """Columns of the table, of the latents' shape."""
    pictures: tuple[Picture, ...]
    identify: Callable[[Any], str]
    """Sample -> sample id; raises BadImageError when it lacks a part."""
    prepare: Callable[[Any, "EncodeSpec"], dict[str, Any]]
    """Sample -> its pictures and the columns that are known before encoding, but for `sample_id`, `source_uri` and
    `bucket`; raises BadImageError when it cannot be used."""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """What it adds to the table's fingerprint."""


@dataclass(frozen=True, kw_only=True)
class EncodeSpec:
    """Everything that decides the output's bytes."""

    config: EncodeSettings
    kind: EncodeKind
    fingerprint: dict[str, Any]
    """What a reader of the latents must match."""
    inputs: dict[str, Any]
    """What the latents are made from."""
    latent_shape: tuple[int, int, int]
    """Channels, height, width."""

    def identity(self) -> dict[str, Any]:
        """What must be equal for two jobs to write the same table; batch size and cluster are free.

        Of the base model only its encoders count, which are in the fingerprint.
        """
        inputs = {name: value for name, value in self.inputs.items() if name not in ("base", "base_hash")}
        return json.loads(json.dumps({**inputs, "fingerprint": self.fingerprint}))
