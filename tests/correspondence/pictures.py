"""Pictures whose colours tell the place in an object's box."""

import io

import numpy as np
from PIL import Image

PLACES = ((0.25, 0.3), (0.75, 0.3), (0.5, 0.7), (0.9, 0.9))
"""Keypoints, as shares of the box."""


def patch(size: tuple[int, int], box: tuple[float, ...], *, blue: float = 0.0) -> bytes:
    """A PNG of this width and height: over the box red and green run from 0 to 1; around it all is blue."""
    width, height = size
    x, y = (np.arange(width) + 0.5 - box[0]) / box[2], (np.arange(height) + 0.5 - box[1]) / box[3]
    across, down = np.meshgrid(x, y)
    within = (across >= 0) & (across <= 1) & (down >= 0) & (down <= 1)
    red, green = (np.where(within, part, 0) for part in (across, down))
    pixels = np.stack([red, green, np.where(within, blue, 1)], -1) * 255
    file = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
