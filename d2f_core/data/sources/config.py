"""Where images are, and how to read them."""

import math
from dataclasses import dataclass
from typing import Literal

from d2f_core.data.sources.sample import SourceError
from d2f_core.identity import since

SPLITS = ("train", "validation", "test")
ALL_SPLITS = "all"


def check_split(split: str | None) -> None:
    if split not in (None, ALL_SPLITS, *SPLITS):
        raise SourceError(f"split={split!r} is none of {', '.join(SPLITS)}, and not {ALL_SPLITS}.")


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Where images are, and how to read them."""

    uri: str = ""
    """A directory, or one .tar or .parquet file: s3://bucket/key or a local path. Several: `*`, `{000..099}`, `{a,b}`
    and lists with commas, unless a file or folder has that very name; each has to name something."""
    kind: Literal["auto", "folder", "webdataset", "parquet"] = "auto"
    """Layout of the source; `auto` detects it, and refuses a mixture."""
    image_column: str = "image"
    """Parquet column with the bytes of image files (or the `datasets` library's struct of bytes and path); without a
    column `image`, `images` is tried."""
    caption_column: str | None = None
    """Column or JSON key of the captions; None tries `caption`, then `text`."""
    split: str | None = since(None, before=None)
    """Part of the source by the names of its folders and shards: `train`, `validation` or `test`; `all` reads them
    together. None: all there is, and a mixture of them is refused."""
    image_extension: str | None = since(None, before=None)
    """Extension of the images, such as `jpg` or `jpg,jpeg`: other pictures, such as a mask beside each, are no images.
    None: of any, and pictures that share one caption are refused."""
    captions: Literal["first", "all"] | None = since(None, before=None)
    """Where an image has several captions: the first, or a sample for each. None refuses them."""
    default_caption: str | None = since(None, before=None)
    """Caption of images that have none; None: they are left out."""

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.captions not in (None, "first", "all"):
            raise SourceError(f"captions={self.captions!r} must be first or all.")
        if self.default_caption is not None and not self.default_caption.strip():
            raise SourceError("default_caption is empty. Give a text, or leave it out.")
        if self.image_extension is not None and not self.extensions:
            raise SourceError(f"image_extension={self.image_extension!r} names none. Give one, such as jpg.")

    @property
    def extensions(self) -> tuple[str, ...]:
        """Those of `image_extension`, in lower case and with their dot; empty: all."""
        names = (name.strip().lstrip(".").lower() for name in (self.image_extension or "").split(","))
        return tuple(f".{name}" for name in names if name)

    @property
    def choices(self) -> dict[str, str]:
        """The settings that choose among what is there, without those that have no effect."""
        names = ("image_extension", "captions", "default_caption")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class DepthSource:
    """Where images with depth are, and how to read them."""

    uri: str = ""
    """A depth table, a directory of tars, or one .tar: s3://bucket/key or a local path; or a pattern, as for images."""
    kind: Literal["auto", "webdataset", "parquet"] = "auto"
    """Layout of the source; `auto` detects it, and refuses a mixture."""
    metres_per_level: float = 0.01
    """Metres per level of 16-bit PNG depth; 0.01 for centimetres."""
    distances: Literal["planar", "radial"] = "planar"
    """`planar`: along the optical axis. `radial`: to the camera's centre; converted with `focal`."""
    focal: float = 886.81 / 1024
    """Focal length as a multiple of the image's width, for `radial`."""
    max_depth: float | None = None
    """Depth in metres beyond which a pixel counts as invalid; None: no limit."""
    latents: bool = False
    """Use the latents stored in a tar instead of encoding image and depth, which may then be missing. They must come
    from the base model's autoencoder at this resolution: tars hold no fingerprint to check that by."""
    split: str | None = since(None, before=None)
    """Part of the source by the names of its folders and tars: `train`, `validation` or `test`; `all` reads them
    together. None: all there is, and a mixture of them is refused."""

    def __post_init__(self) -> None:
        check_split(self.split)
        for name in ("metres_per_level", "focal", "max_depth"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SourceError(f"{name}={value} must be above 0.")


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """Where pairs of images with keypoints are, and how to read them."""

    uri: str = ""
    """A directory, or one .parquet, .jsonl or .json file: s3://bucket/key or a local path."""
    kind: Literal["auto", "spair", "parquet", "jsonl", "coco"] = "auto"
    """`spair`: the directories of SPair-71k. `parquet`, `jsonl`: a row or line per pair. `coco`: objects with
    keypoints, which are paired here. `auto` detects it, and refuses a mixture."""
    images: str | None = None
    """Directory that the paths of images are relative to; None: that of the file that names them. Not for SPair-71k."""
    splits: tuple[str, ...] = ()
    """Those that are read, such as `test`; empty: all. SPair-71k's are trn, val and test; COCO's is the file's name
    without its suffix."""
    categories: tuple[str, ...] = ()
    """Known ones: a pair of another is left out with that reason. Empty: SPair-71k's own 18, or any."""
    layout: Literal["large", "small"] = "large"
    """Which of SPair-71k's lists of pairs."""
    flip_partners: str | None = None
    """JSON file of `{"category": [["left eye", "right eye"], ...]}`: the names (SPair-71k: ids) of keypoints that a
    mirror swaps. None: they are found by the words left and right in their names."""
    partners_per_object: int = 10
    """Most pairs in which an object of COCO is the source."""

    def __post_init__(self) -> None:
        if self.partners_per_object < 1:
            raise SourceError(f"partners_per_object={self.partners_per_object} must be at least 1.")


def lies_in(output: str, source: str) -> bool:
    """Whether an output, as it is written, is its source or a place inside it, where the next listing would find it."""
    return f"{output.rstrip('/')}/".startswith(f"{source.rstrip('/')}/")
