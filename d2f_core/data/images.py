"""Bytes of an image file -> RGB pixels of a given size, or the reason why not; and the mapping of coordinates."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from d2f_core.data.aspect_buckets import Size, enlarges, size_name
from d2f_core.data.crops import Box, crop_box, size_of
from d2f_core.data.image_decoding import Decoded, decode
from d2f_core.data.image_headers import BadImageError
from d2f_core.data.image_rules import ImageRules

__all__ = ["BadImageError", "PreparedImage", "decode_image", "prepare_image"]

BLACK = "#000000"


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
    """Where that part lies in `pixels`; what is outside is the background."""

    turned: bool = False
    """Whether the file holds the image rotated or mirrored, and metadata say so."""

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


def prepare_image(data: bytes, rules: ImageRules, key: str = "") -> PreparedImage:
    """Decode, make upright, crop, pad to a square or keep whole as the rules say, resize; transparency becomes the
    background.

    Args:
        key: what a random crop is drawn from, such as the sample's id.

    Raises:
        BadImageError: with the reason.
    """
    return prepare_decoded(decode(data, rules, reduced=True), rules, key)


def prepare_decoded(decoded: Decoded, rules: ImageRules, key: str = "") -> PreparedImage:
    """As `prepare_image`, of an image that was decoded by the same rules."""
    if rules.fit == "crop":
        return _cropped(decoded, rules, key)
    return _padded(decoded, rules) if rules.fit == "pad" else _whole(decoded, rules)


def decode_image(data: bytes, rules: ImageRules) -> Image.Image:
    """The whole image, upright and in RGB; transparency becomes the background.

    Raises:
        BadImageError: with the reason.
    """
    decoded = decode(data, rules)
    return decoded.in_srgb(decoded.image)


def _cropped(decoded: Decoded, rules: ImageRules, key: str) -> PreparedImage:
    """The part that the rules keep, a square or of one of their sizes."""
    whole = decoded.width, decoded.height
    size = size_of(whole, rules)
    _check_large(whole, size, rules, short=enlarges(whole, size))
    crop = crop_box(whole, size, rules.crop, key)
    return _prepared(decoded, _resized(decoded, crop, size), crop, (0, 0, *size))


def _check_large(whole: Size, size: Size, rules: ImageRules, *, short: bool) -> None:
    """Raise BadImageError for an image that is too short to fill its size, unless the rules enlarge it."""
    if short and not rules.enlarged:
        raise BadImageError(f"too_small: {size_name(whole)} px would be enlarged to {size_name(size)}")


def _padded(decoded: Decoded, rules: ImageRules) -> PreparedImage:
    """The whole image, centred in a square or one of the rules' sizes, which one of its sides fills."""
    whole, crop = (decoded.width, decoded.height), (0, 0, decoded.width, decoded.height)
    size = size_of(whole, rules)
    _check_large(whole, size, rules, short=whole[0] < size[0] and whole[1] < size[1])
    if whole[0] * size[1] >= whole[1] * size[0]:
        inner = (size[0], max(1, round(whole[1] * size[0] / whole[0])))
    else:
        inner = (max(1, round(whole[0] * size[1] / whole[1])), size[1])
    left, top = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    canvas = Image.new("RGB", size, rules.background or BLACK)
    canvas.paste(_resized(decoded, crop, inner), (left, top))
    return _prepared(decoded, canvas, crop, (left, top, left + inner[0], top + inner[1]))


def _whole(decoded: Decoded, rules: ImageRules) -> PreparedImage:
    """The whole image at a width and height."""
    size, crop = rules.whole_size(decoded.width, decoded.height), (0, 0, decoded.width, decoded.height)
    return _prepared(decoded, _resized(decoded, crop, size), crop, (0, 0, *size))


def _resized(decoded: Decoded, crop: Box, size: tuple[int, int]) -> Image.Image:
    """A part of the image at a width and height, in sRGB. Pixels of that size already are untouched."""
    left, top, right, bottom = crop
    whole = decoded.width, decoded.height
    if (right - left, bottom - top) == size and decoded.image.size == whole:
        part = decoded.image if size == whole else decoded.image.crop(crop)
    else:
        x, y = decoded.image.width / whole[0], decoded.image.height / whole[1]  # 1, unless it was reduced
        box = (left * x, top * y, right * x, bottom * y)
        part = decoded.image.resize(size, Image.Resampling.LANCZOS, box=box)
    return decoded.in_srgb(part)


def _prepared(decoded: Decoded, image: Image.Image, crop: Box, box: Box) -> PreparedImage:
    return PreparedImage(
        pixels=np.asarray(image), width=decoded.width, height=decoded.height, crop=crop, box=box, turned=decoded.turned
    )
