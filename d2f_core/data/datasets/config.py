"""Which data set is made, and how large."""

from dataclasses import dataclass
from typing import Literal

from d2f_core.identity import since

Style = Literal["twemoji", "openmoji"]
Fit = Literal["canvas", "drawing"]
Subset = Literal["few", "starter", "core", "all"]
Split = Literal["whole", "train", "test"]


@dataclass(frozen=True, kw_only=True)
class MakeDatasetConfig:
    """The captioned emoji set as an image table."""

    output: str = "s3://d2f/datasets/twemoji"
    """Where the table goes: s3://bucket/key or a local path."""
    style: Literal["twemoji", "openmoji", "both"] = "twemoji"
    """Artists of the drawings: Twemoji, OpenMoji, or both."""
    size: int = 64
    """Height and width in pixels; each size is rendered from the vector drawing."""
    fit: Fit = "canvas"
    """`canvas`: keep the artist's margins. `drawing`: crop to the drawing, so that it fills the picture."""
    subset: Subset = "core"
    """`core`: 297 pictures chosen for being drawable from their name. `starter`: 120 of these, for a finetuning that
    takes minutes. `few`: 32 of those, for one that takes a minute. `all`: every emoji without skin tones."""
    split: Split = since("whole", before="whole")
    """`test`: every eighth row of the whole table that is none of `few`. `train`: the others, so that no drawing is in
    both."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty. Give s3://bucket/key or a local path.")
        if not 16 <= self.size <= 2048:
            raise ValueError(f"size={self.size} is not between 16 and 2048 pixels. Choose the resolution to train at.")

    @property
    def styles(self) -> tuple[Style, ...]:
        return ("twemoji", "openmoji") if self.style == "both" else (self.style,)


@dataclass(frozen=True, kw_only=True)
class MakeDepthConfig:
    """Rendered scenes with their depth as a table."""

    output: str = "s3://d2f/datasets/depth"
    """Where the table goes: s3://bucket/key or a local path."""
    split: Literal["train", "test"] = "train"
    """Split to draw objects and textures from; the splits have none in common."""
    num_scenes: int = 4096
    size: int = 64
    """Height and width of the pictures in pixels."""
    seed: int = 0
    mirrored: bool = False
    """Write every scene a second time, left and right exchanged: twice the rows for one rendering.

    Held-out rows may then have their mirror image among the training rows: evaluate on another split."""
    rows_per_part: int = 64
    """Scenes per output file, the most that is lost when a task is killed."""
    num_tasks: int = 2
    """Scenes rendered in parallel, one logical CPU each."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty. Give s3://bucket/key or a local path.")
        if not 16 <= self.size <= 512:
            raise ValueError(f"size={self.size} is not between 16 and 512 pixels. Choose the resolution to train at.")
        for name in ("num_scenes", "rows_per_part", "num_tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def num_parts(self) -> int:
        return -(-self.num_scenes // self.rows_per_part)
