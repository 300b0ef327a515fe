"""The config of an embedding job. Imports neither torch nor a model, because the tasks that read and write import this
module.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from d2f_core.batch.config import AwaitedPoolConfig
from d2f_core.data.image_rules import MAX_PIXELS_LIMIT, ImageRules
from d2f_core.data.sources.config import ImageSource
from d2f_core.identity import since


class EmbedError(ValueError):
    """An embedding job cannot run as asked; the message gives the reason and the fix."""


FEATURES = "features"
"""Kind of the table that an embedding job writes."""
PREFIX = "features_"


def column_of(teacher: str) -> str:
    """Name of the column with a teacher's features."""
    return PREFIX + teacher


def teacher_of(column: str) -> str:
    """Name of the teacher whose features a column holds."""
    return column.removeprefix(PREFIX)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """One teacher, and where it is read. The fields of another kind than its own have no effect."""

    name: str
    """Of its column, which is called `features_<name>`."""
    kind: Literal["transformer", "diffusion", "efficientnet-lite0"] = "transformer"
    uri: str = ""
    """A directory in transformers' layout, or a base model in diffusers'; or their s3:// prefix."""
    size: int = 434
    """Height and width of the square input in pixels, which the image is stretched to."""
    normalisation: str = "imagenet"
    """Of the input: `imagenet`, `none` ([0, 1]), `half` ([-1, 1], diffusion) or `efficientnet-lite`."""
    layers: int = 0
    """transformer: the block whose normed tokens are read, counted from 1; 0: the last."""
    block: str = "up_blocks.1"
    """diffusion: module path in the UNet."""
    timesteps: tuple[int, ...] = (261,)
    """diffusion: levels of noise, over which features are averaged."""
    prompt: Literal["empty", "generic", "category"] = "empty"
    """diffusion: what the network is told; `category` uses a label."""
    micro_conditioning: bool = False
    """diffusion: whether SDXL is told the image's size."""
    seed: int = 0
    """diffusion: of the noise."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """diffusion: of the UNet."""
    blocks: tuple[int, ...] = (10, 14)
    """efficientnet-lite0: blocks that are read, side by side."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9_]{1,40}", self.name):
            raise EmbedError(f"name={self.name!r} of a teacher must be small letters, digits and _, such as 'dino'.")
        if (self.kind == "efficientnet-lite0") == bool(self.uri):
            which = "is shipped as a package: leave uri out" if self.uri else "needs a uri"
            raise EmbedError(f"teacher {self.name!r} of kind {self.kind!r} {which}.")

    @property
    def column(self) -> str:
        return column_of(self.name)


@dataclass(frozen=True, kw_only=True)
class EmbedWork:
    """Which images, which teachers, and the units of work."""

    source: ImageSource = field(default_factory=ImageSource)
    """Images: a table of views, a folder, tars or parquet. A folder's category is the name of the directory that holds
    the image."""
    split: Literal["", "train", "val", "test"] = ""
    """Of a table of views; empty: all."""
    categories: tuple[str, ...] = ()
    """Of a table of views, only these; empty: all."""
    output: str = ""
    """Where the table is written; repeating the command resumes the job, and does nothing once it is complete."""
    teachers: tuple[TeacherConfig, ...] = ()
    embedding: str = since("", before="")
    """Name of the teacher whose embedding of each whole image is stored too, which `mine_pairs` compares; empty:
    none."""
    pooling: Literal["class", "mean"] = since("class", before="class")
    """What the embedding is: a vision transformer's class token, or the mean of the tokens, each brought to length
    1."""
    size: int = 434
    """Height and width in pixels of the student's input, which is stored beside the features."""
    max_pixels: int = 50_000_000
    """Largest accepted width x height of an image file."""
    max_quarantined_share: float = 0.01
    """Largest share of unusable images before the job stops; duplicates do not count."""
    rows_per_part: int = 64
    """Images per output file, the most that is lost when a task is killed."""
    batch_size: int = 8
    """Images per forward pass of a teacher."""
    num_readers: int = 2
    """Number of parallel tasks that read and decode."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(AwaitedPoolConfig, EmbedWork):
    """Teachers' features of images, as a table that a student is trained on."""

    num_actors: int = 1
    """Number of processes that hold the teachers."""

    def __post_init__(self) -> None:
        self.check_counts("rows_per_part", "batch_size", "num_readers", error=EmbedError)
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise EmbedError(f"teachers are called {names}. Give each a name of its own.")
        self._check_embedding()
        if not 1 <= self.max_pixels <= MAX_PIXELS_LIMIT:
            raise EmbedError(f"max_pixels={self.max_pixels} must be between 1 and {MAX_PIXELS_LIMIT}.")
        if not 0 <= self.max_quarantined_share <= 1:
            raise EmbedError(f"max_quarantined_share={self.max_quarantined_share} must lie in [0, 1]. Use 0.01.")
        if not 14 <= self.size <= 2048:
            raise EmbedError(f"size={self.size} must lie from 14 to 2048 pixels. Use the student's input size.")

    def _check_embedding(self) -> None:
        chosen = next((teacher for teacher in self.teachers if teacher.name == self.embedding), None)
        if self.embedding and chosen is None:
            names = ", ".join(teacher.name for teacher in self.teachers)
            raise EmbedError(f"embedding={self.embedding!r} is no teacher's name. Use one of {names}.")
        if chosen and self.pooling == "class" and chosen.kind != "transformer":
            raise EmbedError(f"{chosen.name!r} of kind {chosen.kind!r} has no class token. Give pooling='mean'.")

    @property
    def embedded_column(self) -> str:
        """The column of features that the embedding is made from; empty: none is stored."""
        return column_of(self.embedding) if self.embedding else ""

    @property
    def rules(self) -> ImageRules:
        return ImageRules(resolution=self.size, min_side=1, max_pixels=self.max_pixels)
