"""Configs of encode jobs. Imports neither torch nor a network, because the tasks that read and write import this
module.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from d2f_core.batch.config import AwaitedPoolConfig
from d2f_core.data.aspect_buckets import BucketSizeError, Size, parse_sizes
from d2f_core.data.image_rules import MAX_PIXELS_LIMIT, Decoding, ImageRules, check_background, check_crop
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
    complete. Without depth, a source that has changed gives it a further version."""
    resolution: int = 64
    """Height and width in pixels that every image is cropped and resized to."""
    crop: Literal["center", "top", "random", "pad"] = since("center", before="center")
    """The part of an image that is kept. `center`: the middle. `top`: the upper end of a tall image, where faces are,
    and the middle of a wide one. `random`: any place, drawn from the sample's id, so that it is the same on any number
    of readers and in any run. `pad`: all of it, with bars on two sides (of `background`, or black), which a mask leaves
    out of a training's loss; for captioned images."""
    min_side: int | None = None
    """Smallest accepted short side in pixels; None: as large as it has to be so that no image is enlarged, which for
    squares is the resolution."""
    max_pixels: int = 50_000_000
    """Most pixels of an image that are decoded, 16 bytes of memory each. Of a JPEG much larger than the result only a
    fraction is, so that photos of 200 million pixels are read with this."""
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
        if self.crop != "pad":
            check_crop(self.crop)
        if self.min_side is not None and self.min_side < 1:
            raise EncodeError(f"min_side={self.min_side} must be at least 1 pixel, or None for the resolution.")
        if not 1 <= self.max_pixels <= MAX_PIXELS_LIMIT:
            raise EncodeError(f"max_pixels={self.max_pixels} must be between 1 and {MAX_PIXELS_LIMIT}.")
        if not 0 <= self.max_quarantined_share <= 1:
            raise EncodeError(f"max_quarantined_share={self.max_quarantined_share} must lie in [0, 1]. Use 0.01.")
        width, height = max(self.sizes or [(self.resolution, self.resolution)], key=lambda size: size[0] * size[1])
        rows = MAX_CHUNK_BYTES // (self.BYTES_PER_PIXEL * width * height)
        if self.rows_per_part > rows:
            pixels = f"{width}x{height}" if self.sizes else str(self.resolution)
            raise EncodeError(
                f"rows_per_part={self.rows_per_part} images of {pixels} pixels are more than "
                f"{MAX_CHUNK_BYTES >> 20} MiB in one piece. Most that fits: {rows}."
            )

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Widths and heights of the aspect-ratio buckets; empty: all images become squares of the resolution."""
        return ()

    @property
    def rules(self) -> ImageRules:
        padded = self.crop == "pad"
        by_size = bool(self.sizes) or padded  # which images would be enlarged depends on their aspect
        min_side = self.min_side or (1 if by_size else self.resolution)
        return ImageRules(
            resolution=self.resolution,
            min_side=min_side,
            max_pixels=self.max_pixels,
            decoding=self.decoding or "srgb",
            background=self.background,
            fit="pad" if padded else "crop",
            crop="center" if self.crop == "pad" else self.crop,
            sizes=self.sizes,
            enlarged=not by_size or self.min_side is not None,
        )


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(EncodeSettings):
    source: ImageSource = field(default_factory=ImageSource)
    """Source of captioned images."""
    text: Literal["online", "states"] = "online"
    """`online`: captions are encoded during training. `states`: text states are stored, in about 5 times the bytes."""
    captions: CaptionRules = since(DEFAULT, before=DEFAULT)
    """How captions are read, here and by every model that is trained on the table."""
    buckets: tuple[str, ...] = since((), before=())
    """Aspect-ratio buckets, WIDTHxHEIGHT in pixels each: an image goes to the one of the nearest aspect in place of
    being cut to a square. `auto`: the sizes of at most the resolution's area whose sides are multiples of
    `bucket_step`. The output then holds a table per bucket that got an image, OUTPUT/WIDTHxHEIGHT, and a training takes
    them all by the one OUTPUT. Without `min_side`, images smaller than their bucket are left out."""
    bucket_step: int = since(64, before=64)
    """What the sides of `--buckets auto` are multiples of, in pixels."""
    flip: bool = since(False, before=False)
    """Encode each image a second time, mirrored left to right, in twice the time and bytes. A training then draws one
    of both for each sample and epoch. Not for images with text, or captions that tell left from right."""
    max_removed_share: float = since(0.5, before=0.5)
    """Largest share of a finished table's images that may be gone from the source when the table gets a further
    version; with more, it is rather the source that is not whole."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except BucketSizeError as error:
            raise EncodeError(str(error)) from None
        if not 0 <= self.max_removed_share <= 1:
            raise EncodeError(f"max_removed_share={self.max_removed_share} must lie in [0, 1]. Use 0.5.")

    @property
    def sizes(self) -> tuple[Size, ...]:
        return parse_sizes(self.buckets, self.resolution, self.bucket_step)


@dataclass(frozen=True, kw_only=True)
class EncodeDepthConfig(EncodeSettings):
    BYTES_PER_PIXEL: ClassVar[int] = 7

    source: DepthSource = field(default_factory=DepthSource)
    """Source of images with depth."""
