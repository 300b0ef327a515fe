"""Configs of encode jobs. Imports neither torch nor a network, because the tasks that read and write import this
module.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from d2f_core.batch.config import AwaitedPoolConfig
from d2f_core.data.image_rules import MAX_PIXELS_LIMIT, Decoding, ImageRules, check_background
from d2f_core.data.sources.config import DepthSource, ImageSource
from d2f_core.identity import since
from d2f_core.model.caption_rules import DEFAULT, CaptionRules

MAX_CHUNK_BYTES = 512 * 2**20
"""Most bytes of pixels in one chunk, which is passed between tasks in one piece."""


class EncodeError(ValueError):
    """An encode job cannot run as asked; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class EncodeWork:
    """The base model for encoding, which images are accepted, and the units of work."""

    base: str = ""
    """Base model whose autoencoder (and text encoder) is used: a directory, s3:// prefix or hub id."""
    output: str = ""
    """Where the latent table is written; repeating the command resumes the job, and does nothing once it is
    complete."""
    resolution: int = 64
    """Height and width in pixels that every image is cropped and resized to."""
    min_side: int | None = None
    """Smallest accepted short side in pixels; None: the resolution, so that no image is enlarged."""
    max_pixels: int = 50_000_000
    """Largest accepted width x height of an image file."""
    decoding: Decoding | None = since(None, before=None)
    """How pixels are read. `srgb`: colours are converted from the file's colour profile to sRGB. `stored`: profiles are
    ignored, as all releases before did. None: as the table at `output` was begun, and `srgb` for a new one."""
    background: str = since("", before="")
    """Colour, as #rrggbb, behind transparent pixels; empty: white."""
    max_quarantined_share: float = 0.01
    """Largest share of unusable samples before the job stops; duplicates do not count. A stopped job can be resumed
    with a higher share."""
    rows_per_part: int = 256
    """Samples per output file, the most that is lost when a task is killed."""
    batch_size: int = 16
    """Images per forward pass of the autoencoder."""
    num_readers: int = 2
    """Number of parallel tasks that read and decode; raise it until the actors never wait."""


@dataclass(frozen=True, kw_only=True)
class EncodeSettings(AwaitedPoolConfig, EncodeWork):
    """Settings common to all encode jobs; each job's own config adds its source."""

    BYTES_PER_PIXEL: ClassVar[int] = 3
    """Bytes per pixel of one sample's pictures, as passed to the actors."""

    num_actors: int = 2
    """Number of processes that hold the autoencoder."""

    def __post_init__(self) -> None:
        self.check_counts("resolution", "rows_per_part", "batch_size", "num_readers", error=EncodeError)
        if self.decoding not in (None, "srgb", "stored"):
            raise EncodeError(f"decoding={self.decoding!r} is not known. Use 'srgb', or 'stored' as before profiles.")
        check_background(self.background)
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
        return ImageRules(
            resolution=self.resolution,
            min_side=min_side,
            max_pixels=self.max_pixels,
            decoding=self.decoding or "srgb",
            background=self.background,
        )


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(EncodeSettings):
    source: ImageSource = field(default_factory=ImageSource)
    """Source of captioned images."""
    text: Literal["online", "states"] = "online"
    """`online`: captions are encoded during training. `states`: text states are stored, in about 5 times the bytes."""
    captions: CaptionRules = since(DEFAULT, before=DEFAULT)
    """How captions are read, here and by every model that is trained on the table."""


@dataclass(frozen=True, kw_only=True)
class EncodeDepthConfig(EncodeSettings):
    BYTES_PER_PIXEL: ClassVar[int] = 7

    source: DepthSource = field(default_factory=DepthSource)
    """Source of images with depth."""
