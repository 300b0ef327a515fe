"""Bytes of an image file -> square RGB pixels, or the reason why not."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS_LIMIT = 178_956_970
"""Pillow refuses larger images by itself."""

SIGNATURES = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"<svg": "SVG",
    b"<?xml": "SVG",
    b"<!DOCTYPE": "HTML",
    b"<html": "HTML",
}

PLAIN_MODES = ("RGB", "L", "1", "CMYK", "YCbCr")


class BadImageError(ValueError):
    """An image that is left out; the message is a code and a detail, the ledger's reason."""


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """Which images are accepted, and what becomes of them."""

    resolution: int
    """Height and width in pixels of the result."""
    min_side: int
    """Smallest accepted short side in pixels."""
    max_pixels: int
    """Largest accepted width x height; checked before decoding, so that a decompression bomb never unfolds."""


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    pixels: np.ndarray
    """uint8 [height, width, 3]."""
    width: int
    """Of the original in pixels, upright."""
    height: int
    crop: tuple[int, int, int, int]
    """Left, top, right, bottom of the part of the original that was kept."""


def prepare_image(data: bytes, rules: ImageRules) -> PreparedImage:
    """Decode, turn upright, cut the centre square, resize; transparency becomes white.

    Raises:
        BadImageError: with the reason.
    """
    image = _open(data)
    width, height = image.size
    if width * height > rules.max_pixels:
        raise BadImageError(f"too_many_pixels: {width}x{height} px, at most {rules.max_pixels} pixels are decoded")
    if min(width, height) < rules.min_side:
        raise BadImageError(f"too_small: {width}x{height} px, the short side must be at least {rules.min_side}")
    # MPO is what phones call a JPEG with a second picture; its first is the photo.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise BadImageError(f"animated: {getattr(image, 'n_frames', 1)} frames, a single picture is needed")
    try:
        image = to_rgb(ImageOps.exif_transpose(image))
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types on broken data; each means the same here
        raise BadImageError(f"undecodable: {type(error).__name__}: {error}") from error
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    crop = (left, top, left + side, top + side)
    target = (rules.resolution, rules.resolution)
    if (side, side) != target:
        image = image.resize(target, Image.Resampling.LANCZOS, box=crop)
    elif (width, height) != target:
        image = image.crop(crop)
    return PreparedImage(pixels=np.asarray(image), width=width, height=height, crop=crop)


def _open(data: bytes) -> Image.Image:
    """Read the header."""
    if not data:
        raise BadImageError("undecodable: empty file")
    for signature, name in SIGNATURES.items():
        if data.startswith(signature):
            raise BadImageError(f"format: {name} is not one of {', '.join(FORMATS)}")
    if data[4:8] == b"ftyp":
        raise BadImageError(f"format: {data[8:12].decode('ascii', 'replace')} is not one of {', '.join(FORMATS)}")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise BadImageError(f"undecodable: not a {', '.join(FORMATS)} file") from None
    except Image.DecompressionBombError:
        raise BadImageError(f"too_many_pixels: more than {MAX_PIXELS_LIMIT} pixels") from None
    except Exception as error:  # a broken header; see prepare_image
        raise BadImageError(f"undecodable: {type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode that has one meaning; transparency on white.

    Raises:
        BadImageError: a mode that has not, such as floating point.
    """
    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey, which Pillow's conversion would clip
        levels = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode in (*PLAIN_MODES, "P"):
        return image.convert("RGB")
    raise BadImageError(f"mode: {image.mode} has no certain meaning as RGB")
