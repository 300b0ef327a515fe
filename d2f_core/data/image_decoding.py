"""Bytes of an image file -> upright RGB, or the reason why not."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from PIL import Image, features
from PIL.JpegImagePlugin import JpegImageFile

from d2f_core.data.crops import size_of
from d2f_core.data.image_colours import check_profile, embedded_profile, to_srgb
from d2f_core.data.image_containers import read_container
from d2f_core.data.image_headers import (
    MAX_IMAGE_BYTES,
    MAX_SCANS,
    BadImageError,
    Declared,
    read_declared,
    too_large,
)
from d2f_core.data.image_rules import ImageRules

STORED_FORMATS = ("PNG", "JPEG", "WEBP")
FORMATS = (*STORED_FORMATS, "BMP", "GIF", "TIFF", "AVIF")

SIGNATURES = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "BigTIFF",
    b"MM\0+": "BigTIFF",
    b"<svg": "SVG",
    b"<?xml": "SVG",
    b"<!DOCTYPE": "HTML",
    b"<html": "HTML",
}
HEIC_BRANDS = ("heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1")
JPEG_XL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
HEIC = "HEIC is not read; convert it to JPEG, as the phone does when it is set to share the most compatible format"

BYTES_PER_PIXEL = 16
"""Most bytes that decoding takes for a pixel, with all copies."""
MAX_REDUCED_PIXELS = 500_000_000
"""Largest width x height of a JPEG that is decoded at a fraction of its size, in little memory."""
REDUCED_TO = 2
"""Times the result's size that a large JPEG is decoded at, at least; what lies between is done by Lanczos."""
WHITE = "#ffffff"
PLAIN_MODES = ("RGB", "L", "1", "CMYK", "YCbCr")
TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
PROFILED_MODES = ("RGB", "L", "CMYK")
"""Modes whose values a colour profile can be applied to after resizing, where there are few of them."""

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


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """An upright image, whose colours need not be sRGB yet."""

    image: Image.Image
    """Of a mode of `PROFILED_MODES` where `profile` is given; otherwise RGB."""
    width: int
    """`width` and `height` of the upright original in pixels."""
    height: int
    profile: bytes | None
    """Colour profile that `image` has still to be converted from."""
    turned: bool = False
    """Whether the file holds the image rotated or mirrored."""

    def in_srgb(self, image: Image.Image) -> Image.Image:
        """A part of `image`, or `image` resized, in sRGB."""
        return image if self.profile is None else to_srgb(image, self.profile)


def decode(data: bytes, rules: ImageRules, *, reduced: bool = False) -> Decoded:
    """The upright image, checked against the rules; transparency becomes the background.

    Args:
        reduced: decode a JPEG at 1/2, 1/4 or 1/8 of its size where at least twice the rules' resolution is left, unless
            the rules ask for pixels as stored. `image` is then smaller than `width` and `height`.

    Raises:
        BadImageError: with the reason.
    """
    declared, size = _check_declared(data, rules, reduced)
    profile = embedded_profile(declared) if rules.decoding == "srgb" else None
    if profile is not None and not check_profile(profile):
        profile = None
    try:
        image = _opened(declared)
        if image.size != (declared.width, declared.height):
            raise BadImageError(f"undecodable: its header says {declared.width}x{declared.height}, not {image.size}")
        if declared.format == "AVIF" and image.n_frames > 1:  # pyright: ignore[reportAttributeAccessIssue]
            raise BadImageError(_animated(image.n_frames))  # pyright: ignore[reportAttributeAccessIssue]
        if size != image.size:
            image.draft(None, size)  # pyright: ignore[reportArgumentType] -- None keeps the mode
        image.load()
        orientation = image.getexif().get(274, 1) if declared.format == "AVIF" else declared.orientation
        if orientation in UPRIGHT:
            image = image.transpose(UPRIGHT[orientation])
        if profile is None or image.mode not in PROFILED_MODES or "transparency" in image.info:
            image, profile = to_rgb(image, profile, rules.background or WHITE), None
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types on broken data; each means the same here
        raise BadImageError(f"undecodable: {_without_addresses(error)}") from error
    width, height = (declared.height, declared.width) if orientation >= 5 else (declared.width, declared.height)
    return Decoded(image=image, width=width, height=height, profile=profile, turned=orientation in UPRIGHT)


def _opened(declared: Declared) -> Image.Image:
    """The image, of which nothing is decoded yet. Pillow's own limit of pixels is passed by for JPEGs, whose memory was
    checked.
    """
    file = io.BytesIO(declared.picture)
    if declared.format == "JPEG" and declared.width * declared.height > (Image.MAX_IMAGE_PIXELS or inf):
        return JpegImageFile(file)
    return Image.open(file, formats=[declared.format])


def _reduced(declared: Declared, rules: ImageRules) -> tuple[int, int]:
    """Width and height to decode a JPEG at, from which the resized image differs by nothing that is seen.

    Sides that the fraction does not divide would end in a column that lies partly outside the image: only an image that
    is too large otherwise is decoded so.
    """
    size = declared.width, declared.height
    upright = (declared.height, declared.width) if declared.orientation >= 5 else size
    times = _times_of_result(upright, rules)
    over_limit = size[0] * size[1] > rules.max_pixels
    for factor in (8, 4, 2):
        if times >= factor * REDUCED_TO and (over_limit or not any(each % factor for each in size)):
            return size[0] // factor, size[1] // factor
    return size


def _times_of_result(whole: tuple[int, int], rules: ImageRules) -> float:
    """How many times an upright image's sides are those of what it is resized to."""
    if rules.fit == "whole":
        return max(whole) / rules.resolution
    width, height = size_of(whole, rules)
    times = whole[0] / width, whole[1] / height
    return min(times) if rules.fit == "crop" else max(times)


def _check_declared(data: bytes, rules: ImageRules, reduced: bool) -> tuple[Declared, tuple[int, int]]:
    """What the file declares, checked against the rules without decoding, and the width and height to decode it at."""
    if not data:
        raise BadImageError("undecodable: empty file")
    if len(data) > MAX_IMAGE_BYTES:
        raise BadImageError(too_large(len(data), MAX_IMAGE_BYTES))
    declared = read_declared(data)
    if declared is None and rules.decoding == "srgb":
        declared = read_container(data)
    if declared is not None and declared.format == "AVIF" and not features.check("avif"):
        raise BadImageError(
            "format: AVIF is not read by this machine's Pillow; install one with libavif (11.3 or later)"
        )
    if declared is None:
        raise BadImageError(_unknown(data, FORMATS if rules.decoding == "srgb" else STORED_FORMATS))
    width, height = size = declared.width, declared.height
    if reduced and declared.format == "JPEG" and rules.decoding == "srgb":
        size = _reduced(declared, rules) if width and height else size
    _check_cost(declared, size, rules.max_pixels)
    if min(width, height) < rules.min_side:
        raise BadImageError(f"too_small: {width}x{height} px, the short side must be at least {rules.min_side}")
    if declared.frames > 1:
        raise BadImageError(_animated(declared.frames))
    return declared, size


def _check_cost(declared: Declared, size: tuple[int, int], max_pixels: int) -> None:
    """Raise BadImageError if decoding at a size takes more memory than that many pixels do at full size, or more passes
    over the picture than they may.
    """
    whole, pixels = declared.width * declared.height, size[0] * size[1]
    limit = f"{declared.width}x{declared.height} px, at most {max_pixels} pixels are decoded"
    if pixels == whole > max_pixels or whole > max(max_pixels, MAX_REDUCED_PIXELS):
        raise BadImageError(f"too_many_pixels: {limit}")
    if pixels < whole and (pixels := pixels + declared.coefficient_bytes // BYTES_PER_PIXEL) > max_pixels:
        raise BadImageError(f"too_many_pixels: {limit}, and these take the memory of {pixels}")
    if declared.scans * whole > MAX_SCANS * max_pixels:
        raise BadImageError(f"too_many_scans: {declared.scans} of {declared.width}x{declared.height} px")


def _animated(frames: int) -> str:
    return f"animated: {frames} frames, a single picture is needed"


def _unknown(data: bytes, formats: Sequence[str]) -> str:
    """The reason for a file of another format, by its first bytes."""
    names = ", ".join(formats)
    for signature, name in SIGNATURES.items():
        if data.startswith(signature):
            return f"format: {name} is not one of {names}"
    if data.startswith(JPEG_XL):
        return "format: JPEG XL is not read; convert it to PNG or JPEG (djxl)"
    if data[4:8] == b"ftyp":
        brand = data[8:12].decode("ascii", "replace")
        return f"format: {HEIC}" if brand in HEIC_BRANDS else f"format: {brand} is not one of {names}"
    return f"undecodable: not a {names} file"


def _without_addresses(error: Exception) -> str:
    """Type and text of Pillow's error without object addresses, which would make ledgers of equal runs differ."""
    return f"{type(error).__name__}: {re.sub(r'<[^>]* object at 0x[0-9a-f]+>', 'the file', str(error))}"


def to_rgb(image: Image.Image, profile: bytes | None = None, background: str = WHITE) -> Image.Image:
    """RGB of any mode that has one meaning.

    Args:
        profile: colour profile that the image's values are converted from; None: they are sRGB's.
        background: colour behind transparent pixels.

    Raises:
        BadImageError: a mode without one meaning, such as floating point; or the profile cannot be parsed.
    """
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
        return _over(background, image, profile)
    if image.mode not in (*PLAIN_MODES, "P"):
        raise BadImageError(f"mode: {image.mode} has no certain meaning as RGB")
    if profile is not None:
        return to_srgb(image if image.mode in PROFILED_MODES else image.convert("RGB"), profile)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow's conversion would clip, as its upper 8 bits: right whether white is 65535, or 65280 as
    in files that were made by a shift.

    Raises:
        BadImageError: values of more than 16 bits, whose white is anywhere.
    """
    levels = np.asarray(image)
    if image.mode == "I" and levels.size and (levels.min() < 0 or levels.max() > 65535):
        raise BadImageError(f"mode: values from {levels.min()} to {levels.max()} have no certain meaning as grey")
    return Image.fromarray((levels >> 8).astype(np.uint8))


def _over(background: str, image: Image.Image, profile: bytes | None) -> Image.Image:
    """A transparent image over a colour. Its own are converted before, as the background is one of sRGB."""
    layer = image.convert("RGBA")
    if profile is not None:
        grey = image.mode in ("LA", "La")
        opaque = to_srgb(layer.convert("RGB").convert("L") if grey else layer.convert("RGB"), profile)
        opaque.putalpha(layer.getchannel("A"))
        layer = opaque
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")
