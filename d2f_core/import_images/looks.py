"""What a picture looks like, in two numbers: a perceptual hash, by which copies are found, and how sharp it is."""

import numpy as np
from PIL import Image

HASH_EDGE, HASH_BITS = 32, 64
SHARP_EDGE = 256
"""Long side at which sharpness is measured, so that large and small pictures compare."""


def _cosines(size: int, kept: int) -> np.ndarray:
    """The first rows of the orthonormal DCT-II, [kept, size]."""
    row, column = np.arange(kept)[:, None], np.arange(size)
    scale = np.where(row == 0, np.sqrt(1 / size), np.sqrt(2 / size))
    return scale * np.cos(np.pi * (2 * column + 1) * row / (2 * size))


COSINES = _cosines(HASH_EDGE, 8)


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that stay alike under resizing, compression and small changes of light ("pHash").

    They say which of the 8x8 lowest frequencies of the 32x32 px grey picture lie above their median; the first, the
    mean brightness, takes no part in it.
    """
    grey = np.asarray(image.convert("L").resize((HASH_EDGE, HASH_EDGE), Image.Resampling.LANCZOS), np.float64)
    low = (COSINES @ grey @ COSINES.T).ravel()
    low[np.abs(low) < 1e-6] = 0.0  # rounding of an even picture, whose bits would be chance
    bits = low > np.median(low[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of the grey picture at 256 px: below about 100, photos look blurred."""
    grey = image.convert("L")
    grey.thumbnail((SHARP_EDGE, SHARP_EDGE), Image.Resampling.BOX)
    x = np.pad(np.asarray(grey, np.float64), 1, mode="edge")
    laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
    return float(laplacian.var())
