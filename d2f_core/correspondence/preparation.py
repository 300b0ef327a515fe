"""How an image becomes a network's input, and which part of the input a point of the image falls on.

A model stores its preparation and every job uses it: a network that was trained on other numbers than it is asked with
answers worse, and nothing tells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from d2f_core.correspondence.matching import Size

NORMALISATIONS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0,) * 3, (1.0,) * 3),
    "half": ((0.5,) * 3, (0.5,) * 3),
    "efficientnet-lite": ((127 / 255,) * 3, (128 / 255,) * 3),
}
"""Name -> mean and standard deviation of pixels in [0, 1]: `none` leaves [0, 1], `half` gives [-1, 1]."""
SMALLEST, LARGEST = 14, 2048


def normalise(pixels: Tensor, normalisation: str) -> Tensor:
    """Pixels from 0 to 255, [..., 3, height, width], as a network takes them; one of `NORMALISATIONS`."""
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALISATIONS[normalisation])
    return (pixels / 255 - mean) / std


@dataclass(frozen=True, kw_only=True)
class Preparation:
    size: int
    """Height and width of the network's square input in pixels."""
    normalisation: str = "imagenet"
    """One of `NORMALISATIONS`."""
    fit: Literal["stretch", "pad"] = "stretch"
    """`stretch`: the image fills the square, whatever its shape. `pad`: it keeps its shape, between black borders."""

    def __post_init__(self) -> None:
        if not SMALLEST <= self.size <= LARGEST:
            raise ValueError(f"size={self.size} must lie from {SMALLEST} to {LARGEST} pixels. Give one in between.")
        if self.normalisation not in NORMALISATIONS:
            known = ", ".join(NORMALISATIONS)
            raise ValueError(f"normalisation={self.normalisation!r} is not known. Use one of {known}.")
        if self.fit not in ("stretch", "pad"):
            raise ValueError(f"fit={self.fit!r} is not known. Use 'stretch' or 'pad'.")

    def pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        """The input, float32 [images, 3, size, size], of uint8 images [h, w, 3] of any sizes."""
        return torch.stack([normalise(self._square(image), self.normalisation) for image in images])

    def _square(self, image: np.ndarray) -> Tensor:
        """The image in numbers from 0 to 255, [3, size, size]."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(f"an image is {image.dtype} {image.shape}; it must be uint8 [h, w, 3]. Decode it as RGB.")
        whole = torch.tensor(image).permute(2, 0, 1).float()
        if self.fit == "pad":
            height, width = image.shape[:2]
            side = max(height, width)
            left, top = (side - width) // 2, (side - height) // 2
            whole = pad(whole, (left, side - width - left, top, side - height - top))
        if whole.shape[1:] == (self.size, self.size):
            return whole
        return interpolate(whole[None], (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)[0]

    def frame(self, size: Size) -> tuple[Size, Size]:
        """What the input shows of an image of this width and height, in the image's pixels.

        Returns:
            Width and height of the shown frame, and where in it the image's corner lies.
        """
        if self.fit == "stretch":
            return size, (0, 0)
        side = max(size)
        return (side, side), tuple((side - length) // 2 for length in size)  # type: ignore[return-value]
