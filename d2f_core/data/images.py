"""Bytes of an image file -> RGB pixels of a fixed size, or the reason why not; and the mapping of coordinates."""

import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from d2f_core.data.image_headers import MAX_IMAGE_BYTES, BadImageError, Declared, read_declared, too_large
from d2f_core.data.image_rules import ImageRules

FORMATS = ("PNG", "JPEG", "WEBP")

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

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transformation that makes an image upright, by EXIF orientation."""


Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    pixels: np.ndarray
    """uint8 [height, width, 3]."""
    width: int
    """`width` and `height` of the upright original in pixels."""
    height: int
    crop: Box
    """The part of the original that was kept."""
    box: Box
    """Where that part lies in `pixels`; what is outside is black."""

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """Points of the original as coordinates in `pixels`; a point outside `box` was cropped away.

        Args:
            points: float [..., 2], x and y in pixels of the upright original from its upper left corner: the centre of
                the first pixel is (0.5, 0.5).
        """
        return _moved(points, self.crop, self.box)

    def to_original(self, points: np.ndarray) -> np.ndarray:
        """The reverse of `to_pixels`."""
        return _moved(points, self.box, self.crop)


def _moved(points: np.ndarray, source: Box, target: Box) -> np.ndarray:
    """Map points [..., 2] from one box to another; float64."""
    (left, top, right, bottom), (to_left, to_top, to_right, to_bottom) = source, target
    scale = np.array([(to_right - to_left) / (right - left), (to_bottom - to_top) / (bottom - top)])
    return (np.asarray(points, np.float64) - (left, top)) * scale + (to_left, to_top)


def prepare_image(data: bytes, rules: ImageRules) -> PreparedImage:
    """Decode, make upright, crop or pad to a square or keep whole as the rules say, resize; transparency becomes white.

    Raises:
        BadImageError: with the reason.
    """
    image = decode_image(data, rules)
    if rules.fit == "whole":
        return _whole(image, rules.whole_size(*image.size))
    return (_cropped if rules.fit == "crop" else _padded)(image, rules.resolution)


def decode_image(data: bytes, rules: ImageRules) -> Image.Image:
    """The whole image, upright and in RGB; transparency becomes white.

    Raises:
        BadImageError: with the reason.
    """
    declared = _check_declared(data, rules)
    try:
        image = Image.open(io.BytesIO(declared.picture), formats=[declared.format])
        if image.size != (declared.width, declared.height):
            raise BadImageError(f"undecodable: its header says {declared.width}x{declared.height}, not {image.size}")
        image.load()
        if declared.orientation in UPRIGHT:
            image = image.transpose(UPRIGHT[declared.orientation])
        return to_rgb(image)
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types on broken data; each means the same here
        raise BadImageError(f"undecodable: {_without_addresses(error)}") from error


def _cropped(image: Image.Image, size: int) -> PreparedImage:
    """The centre square."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    crop = (left, top, left + side, top + side)
    if side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=crop)
    elif (width, height) != (size, size):
        image = image.crop(crop)
    return PreparedImage(pixels=np.asarray(image), width=width, height=height, crop=crop, box=(0, 0, size, size))


def _padded(image: Image.Image, size: int) -> PreparedImage:
    """The whole image, centred; its longer side fills the square."""
    width, height = image.size
    longer = max(width, height)
    inner_width, inner_height = (max(1, round(side * size / longer)) for side in (width, height))
    left, top = (size - inner_width) // 2, (size - inner_height) // 2
    if (inner_width, inner_height) != (width, height):
        image = image.resize((inner_width, inner_height), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size))
    square.paste(image, (left, top))
    box = (left, top, left + inner_width, top + inner_height)
    return PreparedImage(pixels=np.asarray(square), width=width, height=height, crop=(0, 0, width, height), box=box)


def _whole(image: Image.Image, size: tuple[int, int]) -> PreparedImage:
    """The whole image at a width and height."""
    width, height = image.size
    resized = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
    crop = (0, 0, width, height)
    return PreparedImage(pixels=np.asarray(resized), width=width, height=height, crop=crop, box=(0, 0, *size))


def _check_declared(data: bytes, rules: ImageRules) -> Declared:
    """What the file declares, checked against the rules without decoding."""
    if not data:
        raise BadImageError("undecodable: empty file")
    if len(data) > MAX_IMAGE_BYTES:
        raise BadImageError(too_large(len(data), MAX_IMAGE_BYTES))
    for signature, name in SIGNATURES.items():
        if data.startswith(signature):
            raise BadImageError(f"format: {name} is not one of {', '.join(FORMATS)}")
    if data[4:8] == b"ftyp":
        raise BadImageError(f"format: {data[8:12].decode('ascii', 'replace')} is not one of {', '.join(FORMATS)}")
    declared = read_declared(data)
    if declared is None:
        raise BadImageError(f"undecodable: not a {', '.join(FORMATS)} file")
    width, height = declared.width, declared.height
    if width * height > rules.max_pixels:
        raise BadImageError(f"too_many_pixels: {width}x{height} px, at most {rules.max_pixels} pixels are decoded")
    if min(width, height) < rules.min_side:
        raise BadImageError(f"too_small: {width}x{height} px, the short side must be at least {rules.min_side}")
    if declared.frames > 1:
        raise BadImageError(f"animated: {declared.frames} frames, a single picture is needed")
    return declared


def _without_addresses(error: Exception) -> str:
    """Type and text of Pillow's error without object addresses, which would make ledgers of equal runs differ."""
    return f"{type(error).__name__}: {re.sub(r'<[^>]* object at 0x[0-9a-f]+>', 'the file', str(error))}"


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode that has one meaning; transparency on white.

    Raises:
        BadImageError: a mode without one meaning, such as floating point.
    """
    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey, which Pillow's conversion would clip
        levels = np.asarray(image) >> 8
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode in (*PLAIN_MODES, "P"):
        return image.convert("RGB")
    raise BadImageError(f"mode: {image.mode} has no certain meaning as RGB")
