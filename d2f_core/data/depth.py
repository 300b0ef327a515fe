"""Depth maps as samples: their table's columns, the affine-invariant form that is learnt, and masks of valid latents.

A depth map is float32 [height, width]: metres along the optical axis, NaN where depth is unknown. A network learns its
affine-invariant form (scale and offset removed), encoded by an image autoencoder as three equal channels.

Source: Ke et al., "Repurposing Diffusion-Based Image Generators for Monocular Depth Estimation" (Marigold), CVPR 2024,
arXiv:2312.02145.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from d2f_core.data.image_headers import BadImageError

DEPTH_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("depth", pa.binary(), nullable=False),
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("scene", pa.string(), nullable=False),
    ]
)
"""One row per pair: `image` is a PNG, JPEG or WebP file, `depth` a .npy file (`depth_files.encode_depth`), `scene`
describes the scene in words. `sample_id` is that of the image alone (`schema.sample_id(image, "")`), so that
predictions from an image can be matched with its depth."""


class BadDepthError(BadImageError):
    """A pair that is left out because of its depth; the message, `code: detail`, is the reason in the ledger."""


def clean_depth(depth: np.ndarray) -> np.ndarray:
    """Float32 depth with NaN in place of infinite, zero and negative values.

    Data sets write such values where nothing was measured (sky, reflections, a sensor's holes), so the pixel is left
    out, not the pair; `normalise_depth` refuses a pair without any valid pixel.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        depth = np.asarray(depth, np.float32)
        return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(np.nan))


def planar_depth(distance: np.ndarray, focal: float) -> np.ndarray:
    """Depth along the optical axis, from distances [height, width] to the camera's centre.

    Pixel centres lie at -(width - 1) / 2 ... (width - 1) / 2, the optical axis passes through the middle of the image:
    depth = distance * focal / |(x, y, focal)|.

    Args:
        focal: focal length in pixels of this image.

    Source: the conversion that Hypersim's authors give for its `depth_meters` files.
    """
    height, width = distance.shape
    x, y = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    length = np.sqrt(x[None, :] ** 2 + y[:, None] ** 2 + focal**2)
    return (distance * (focal / length)).astype(np.float32)


def crop_and_resize(values: np.ndarray, crop: Sequence[int], size: int) -> np.ndarray:
    """Crop a square from values [height, width] and resize it to [size, size] by nearest neighbour.

    Depth is never averaged: between a near and a far surface the mean is no depth of either.

    Args:
        crop: left, top, right, bottom of the square in pixels.
    """
    left, top, right, bottom = crop
    rows = top + ((np.arange(size) + 0.5) * (bottom - top) / size).astype(int)
    columns = left + ((np.arange(size) + 0.5) * (right - left) / size).astype(int)
    return values[np.ix_(rows, columns)]


def normalise_depth(
    depth: np.ndarray, valid: np.ndarray, low: float = 0.02, high: float = 0.98
) -> tuple[np.ndarray, float, float]:
    """The affine-invariant form of a depth map, and the depths that were mapped to -1 and 1.

    The quantiles `low` and `high` of the valid pixels are mapped to -1 and 1, values outside are clipped, and pixels
    without depth become 1, the far end.

    Args:
        depth: float [height, width]; only its valid pixels are used.
        valid: bool [height, width].

    Returns:
        Float32 [height, width] in [-1, 1], and two depths in the unit of `depth`.

    Raises:
        BadDepthError: `mask_size`, `no_valid_depth`, or `flat_depth` when the quantiles are equal.
    """
    if depth.shape != valid.shape:
        raise BadDepthError(f"mask_size: the mask is {size_text(valid)} px, the depth {size_text(depth)}")
    known = depth[valid].astype(np.float64)
    if not known.size or not np.isfinite(known).all():
        infinite = np.count_nonzero(~np.isfinite(known))
        raise BadDepthError(f"no_valid_depth: {known.size} of {depth.size} pixels, {infinite} of them not finite")
    near, far = (float(value) for value in np.quantile(known, [low, high]))
    if far <= near * (1 + 1e-6):
        raise BadDepthError(f"flat_depth: {near:g} m nearly everywhere, which leaves nothing to learn")
    values = np.clip((depth - near) / (far - near) * 2 - 1, -1, 1)
    return np.where(valid, values, 1).astype(np.float32), near, far


def latent_mask(valid: np.ndarray, latent_size: tuple[int, int]) -> np.ndarray:
    """Uint8 [1, h, w]: 1 where every pixel that a latent covers is valid.

    Args:
        valid: bool [height, width].
        latent_size: h, w; they divide height and width.

    Raises:
        BadDepthError: `mask_size` when they do not; `no_valid_depth` when no latent is valid.
    """
    (height, width), (h, w) = valid.shape, latent_size
    if height % h or width % w:
        raise BadDepthError(f"mask_size: {size_text(valid)} px cannot be divided into {w}x{h} latents")
    mask = np.all(valid.reshape(h, height // h, w, width // w), axis=(1, 3))
    if not mask.any():
        raise BadDepthError(
            f"no_valid_depth: {int(valid.sum())} of {valid.size} pixels, and no latent has all of its own"
        )
    return np.asarray(mask, np.uint8)[None]


def size_text(values: np.ndarray) -> str:
    """`width x height` of an array [height, width], for a message."""
    return "x".join(str(size) for size in reversed(values.shape))
