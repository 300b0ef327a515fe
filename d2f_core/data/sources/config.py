"""Where images are, and how to read them."""

import math
from dataclasses import dataclass
from typing import Literal

from d2f_core.data.sources.sample import SourceError


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Where images are, and how to read them."""

    uri: str = ""
    """A directory, or one .tar or .parquet file: s3://bucket/key or a local path."""
    kind: Literal["auto", "folder", "webdataset", "parquet"] = "auto"
    """Layout of the source; `auto` detects it, and refuses a mixture."""
    image_column: str = "image"
    """Parquet column with the bytes of image files (or the `datasets` library's struct of bytes and path)."""
    caption_column: str | None = None
    """Column or JSON key of the captions; None tries `caption`, then `text`."""


@dataclass(frozen=True, kw_only=True)
class DepthSource:
    """Where images with depth are, and how to read them."""

    uri: str = ""
    """A depth table, a directory of tars, or one .tar: s3://bucket/key or a local path."""
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

    def __post_init__(self) -> None:
        for name in ("metres_per_level", "focal", "max_depth"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SourceError(f"{name}={value} must be above 0.")
