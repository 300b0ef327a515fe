"""Config of importing images. Imports neither torch nor a decoder, because it is read at the prompt."""

from dataclasses import dataclass, field
from typing import Literal

from d2f_core.batch.config import AwaitedPoolConfig
from d2f_core.data.image_rules import MAX_PIXELS_LIMIT, Crop, ImageRules, check_background, check_crop
from d2f_core.data.sources.config import ImageSource
from d2f_core.identity import since
from d2f_core.model.caption_rules import DEFAULT, CaptionRules

UNBOUNDED = 65_536
"""Side in pixels that no image reaches, as all are decoded that are not made smaller."""
MOST_DISTANCE = 10
"""Of 64 bits: pictures whose hashes differ in more of them are seldom the same photo."""


class ImportImagesError(ValueError):
    """Images cannot be imported as asked; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class ImportImagesWork:
    """Which images are taken, what is done to them, and which are held out."""

    source: ImageSource = field(default_factory=ImageSource)
    """Source of captioned images."""
    output: str = ""
    """Where train/, test/, report.html and the ledger go; repeating the command resumes the job, and does nothing once
    it is complete."""
    resolution: int = 0
    """Height and width in pixels of every image: a square of it, resized. 0: images keep their aspect."""
    crop: Crop = since("center", before="center")
    """With a resolution: the square that is kept. `center`: the middle. `top`: the upper end of a tall image, where
    faces are, and the middle of a wide one. `random`: any place, drawn from the bytes of the file and its caption."""
    short_side: int = 1024
    """With resolution=0: an image with a longer short side is made smaller until it has this one. 0: none is."""
    min_side: int = 256
    """Smallest accepted short side in pixels; with a resolution, at least that one, so that no image is enlarged."""
    max_pixels: int = 50_000_000
    """Most pixels of an image that are decoded, 16 bytes of memory each. Of a JPEG much larger than the result only a
    fraction is, so that photos of 200 million pixels are read with this."""
    background: str = ""
    """Colour, as #rrggbb, behind transparent pixels; empty: white."""
    held_out_share: float = 0.05
    """Share of the images that go to test/, chosen by the bytes of their files: whatever is made of an image, and
    whatever its caption, it is on the same side; images that look alike follow the one whose hash is smallest."""
    held_out_least: int = 0
    """Fewest images that go to test/, whatever the share: an evaluation needs at least 16. Which ones are added then
    depends on the other images too."""
    near_distance: int = 4
    """Images whose 64-bit perceptual hashes differ in at most so many bits count as alike; -1: none do."""
    near_duplicates: Literal["keep", "drop"] = "keep"
    """Of images that look alike: `keep` them all, on one side of the split, or `drop` all but the largest. Either way
    they are listed in duplicates.jsonl and shown in the report. The hashes see no colour: even areas of any colour look
    alike to them."""
    base: str = ""
    """Base model whose tokenizer counts the captions' tokens for the report; empty: only words are counted."""
    captions: CaptionRules = since(DEFAULT, before=DEFAULT)
    """How captions will be read, by which the report tells those that are cut."""
    max_quarantined_share: float = 0.05
    """Largest share of unusable images before the job stops; duplicates do not count. A stopped job can be resumed
    with a higher share."""
    rows_per_part: int = 64
    """Images per output file, the most that is lost when a task is killed."""
    num_readers: int = 2
    """Number of parallel tasks that read and decode images, with half a logical CPU each, and that write the tables
    afterwards, with a whole one."""


@dataclass(frozen=True, kw_only=True)
class ImportImagesConfig(AwaitedPoolConfig, ImportImagesWork):
    num_actors: int = 1
    """Number of processes that pass finished images on."""

    def __post_init__(self) -> None:
        self.check_counts("rows_per_part", "num_readers", "min_side", error=ImportImagesError)
        for name in ("resolution", "short_side"):
            if getattr(self, name) < 0:
                raise ImportImagesError(f"{name}={getattr(self, name)} must be at least 0.")
        if self.resolution == 0 and 0 < self.short_side < self.min_side:
            raise ImportImagesError(
                f"short_side={self.short_side} is below min_side={self.min_side}, so that every image would become too "
                "small to be read again. Lower min_side."
            )
        check_background(self.background)
        check_crop(self.crop)
        if not 1 <= self.max_pixels <= MAX_PIXELS_LIMIT:
            raise ImportImagesError(f"max_pixels={self.max_pixels} must be between 1 and {MAX_PIXELS_LIMIT}.")
        for name in ("max_quarantined_share", "held_out_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ImportImagesError(f"{name}={getattr(self, name)} must lie in [0, 1]. Use 0.05.")
        if self.held_out_least < 0:
            raise ImportImagesError(f"held_out_least={self.held_out_least} must be at least 0.")
        if self.held_out_share == 1:
            raise ImportImagesError("held_out_share=1 leaves no image to train on. Use 0.05.")
        if not -1 <= self.near_distance <= MOST_DISTANCE:
            raise ImportImagesError(f"near_distance={self.near_distance} must lie in [-1, {MOST_DISTANCE}]. Use 4.")

    @property
    def rules(self) -> ImageRules:
        return ImageRules(
            resolution=self.resolution or self.short_side or UNBOUNDED,
            min_side=max(self.min_side, self.resolution),
            max_pixels=self.max_pixels,
            decoding="srgb",
            background=self.background,
            crop=self.crop,
        )
