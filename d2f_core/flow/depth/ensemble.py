"""Combines several depth maps of one image into one with its uncertainty, and encodes maps as files. Numpy and Pillow
only.

A relative depth map is float32 [height, width] in [0, 1]: 0 is near, 1 is far, known up to scale and shift.
"""

import io

import numpy as np
from PIL import Image

from d2f_core.flow.depth.metrics import align_scale_shift

Array = np.ndarray
PNG_LEVELS = 65535
COLOURS = "Spectral"
"""Name of the matplotlib colour map: red is near, blue is far."""


def combine(members: Array) -> tuple[Array, Array]:
    """Median and median absolute deviation of maps [members, height, width], after alignment in scale and shift.

    Each map is fitted to the mean of all by least squares. If the median leaves [0, 1], both results are rescaled
    together.

    Source: Ke et al. (Marigold), CVPR 2024, arXiv:2312.02145, section 3.3, with a fit in closed form.
    """
    if len(members) > 1:
        middle = np.broadcast_to(members.mean(0, dtype=np.float64), members.shape)
        members = align_scale_shift(members, middle)
    depth = np.median(members, 0)
    uncertainty = np.median(np.abs(members - depth), 0)
    low, high = min(0.0, float(depth.min())), max(1.0, float(depth.max()))
    return ((depth - low) / (high - low)).astype(np.float32), (uncertainty / (high - low)).astype(np.float32)


def depth_png(depth: Array) -> bytes:
    """A 16-bit grey PNG: 0 is near, 65535 far."""
    return _png(Image.fromarray(np.rint(depth.astype(np.float64) * PNG_LEVELS).astype(np.uint16)))


def depth_npy(depth: Array) -> bytes:
    """A .npy file of float32 [height, width]."""
    sink = io.BytesIO()
    np.save(sink, np.ascontiguousarray(depth, np.float32), allow_pickle=False)
    return sink.getvalue()


def coloured(depth: Array) -> Array:
    """The map in colours, uint8 [height, width, 3], stretched over the whole colour map; grey where it is not
    finite.
    """
    from matplotlib import colormaps

    finite = np.isfinite(depth)
    low, high = (depth[finite].min(), depth[finite].max()) if finite.any() else (0.0, 1.0)
    values = (np.where(finite, depth, low) - low) / max(float(high - low), 1e-12)
    pixels = np.rint(colormaps[COLOURS](values)[..., :3] * 255).astype(np.uint8)
    return np.where(finite[..., None], pixels, np.uint8(128))


def preview_png(pixels: Array, depth: Array) -> bytes:
    """Image and coloured depth side by side."""
    return _png(Image.fromarray(np.concatenate([pixels, coloured(depth)], axis=1)))


def _png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format="PNG")
    return sink.getvalue()
