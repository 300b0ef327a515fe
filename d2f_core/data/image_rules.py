"""Which images are accepted, and how many pixels one may have."""

import re
from dataclasses import dataclass
from typing import Literal

from d2f_core.identity import since

MAX_PIXELS_LIMIT = 178_956_970
"""Pillow refuses larger images by itself."""

Decoding = Literal["srgb", "stored"]
Crop = Literal["center", "top", "random"]
CROPS: tuple[Crop, ...] = ("center", "top", "random")
COLOUR = re.compile("#[0-9a-fA-F]{6}")


def check_background(colour: str) -> None:
    """Raise ValueError unless it is a colour or empty."""
    if colour and not COLOUR.fullmatch(colour):
        raise ValueError(
            f"background={colour!r} is not a colour. Give it as #rrggbb, such as #808080, or leave it out."
        )


def check_crop(crop: str) -> None:
    """Raise ValueError unless it is one of `CROPS`."""
    if crop not in CROPS:
        raise ValueError(f"crop={crop!r} is not a way to crop. Use one of {', '.join(CROPS)}.")


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """Which images are accepted, and how they are resized."""

    resolution: int
    """Height and width of the result in pixels; with `whole`, of its long side."""
    min_side: int
    """Smallest accepted short side in pixels."""
    max_pixels: int
    """Largest number of pixels that is decoded, 16 bytes of memory each; checked before decoding, so that a
    decompression bomb is never unpacked. A JPEG that is decoded at a fraction of its size counts with that."""
    fit: Literal["crop", "pad", "whole"] = since("crop", before="crop")
    """How an image becomes square. `crop`: a part of it. `pad`: the whole image, with bars on two sides.
    `whole`: not at all, it keeps its aspect."""
    multiple: int = since(1, before=1)
    """With `whole`: what both sides of the result are multiples of, in pixels; the aspect is rounded to it."""

    decoding: Decoding = since("stored", before="stored")
    """How pixels are read. `srgb`: colours are converted from the file's profile to sRGB, and JPEGs much larger than
    the result are decoded at 1/2, 1/4 or 1/8 of their size. `stored`: the file's values, without either, as all
    releases before did; whatever was made with them goes on with it."""

    background: str = since("", before="")
    """Colour, as #rrggbb, behind transparent pixels and beside a padded image; empty: white behind, black beside."""

    crop: Crop = since("center", before="center")
    """With `fit` crop: which part is kept (see `crops.crop_box`)."""
    sizes: tuple[tuple[int, int], ...] = since((), before=())
    """With `fit` crop or pad: widths and heights, of which each image is brought to the one with the nearest aspect;
    empty: all become squares of the resolution."""
    enlarged: bool = since(True, before=True)
    """With `fit` crop or pad: whether an image that is smaller than its size is enlarged; otherwise it is left out."""

    def __post_init__(self) -> None:
        check_background(self.background)
        check_crop(self.crop)
        if self.decoding not in ("srgb", "stored"):
            raise ValueError(f"decoding={self.decoding!r} is not known. Use 'srgb', or 'stored' as before profiles.")
        if self.fit not in ("crop", "pad", "whole"):
            raise ValueError(
                f"fit={self.fit!r} is not a way to make a square. Use 'crop' or 'pad', or 'whole' for none."
            )
        if self.multiple < 1 or self.resolution % self.multiple:
            raise ValueError(
                f"resolution={self.resolution} must be a multiple of {self.multiple} pixels, as both sides of a whole "
                f"image are. Nearest below: {self.resolution // max(self.multiple, 1) * self.multiple}."
            )

    def whole_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of a whole image after resizing: its long side has the resolution."""
        longer, unit = max(width, height), self.multiple
        sides = (max(1, round(side * self.resolution / longer / unit)) * unit for side in (width, height))
        return next(sides), next(sides)
