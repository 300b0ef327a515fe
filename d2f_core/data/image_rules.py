"""Which images are accepted, and how many pixels one may have."""

from dataclasses import dataclass

MAX_PIXELS_LIMIT = 178_956_970
"""Pillow refuses larger images by itself."""


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """Which images are accepted, and what becomes of them."""

    resolution: int
    """Height and width in pixels of the result."""
    min_side: int
    """Smallest accepted short side in pixels."""
    max_pixels: int
    """Largest accepted width x height; checked before decoding, so that a decompression bomb never unfolds."""
