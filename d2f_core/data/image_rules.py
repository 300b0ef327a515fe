"""Which images are accepted, and how many pixels one may have."""

from dataclasses import dataclass
from typing import Literal

from d2f_core.identity import since

MAX_PIXELS_LIMIT = 178_956_970
"""Pillow refuses larger images by itself."""


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """Which images are accepted, and how they are resized."""

    resolution: int
    """Height and width of the result in pixels."""
    min_side: int
    """Smallest accepted short side in pixels."""
    max_pixels: int
    """Largest accepted width x height; checked before decoding, so that a decompression bomb is never unpacked."""
    fit: Literal["crop", "pad"] = since("crop", before="crop")
    """How an image becomes square. `crop`: its centre square. `pad`: the whole image, with black bars on two sides."""

    def __post_init__(self) -> None:
        if self.fit not in ("crop", "pad"):
            raise ValueError(f"fit={self.fit!r} is not a way to make a square. Use 'crop' or 'pad'.")
