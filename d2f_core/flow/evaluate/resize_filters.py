"""How images are scaled to the input of Inception-v3. FID depends on it, so it is part of every metric's name.

| name           | filter                                                                                              |
|----------------|-----------------------------------------------------------------------------------------------------|
| clean-fid      | Pillow's bicubic with antialiasing, each channel in float32, not rounded, clipped to 0 to 255       |
| torch-fidelity | TensorFlow 1's bilinear: source = target * scale, no half-pixel centres, no antialiasing            |

Sources: Parmar et al., 2022, arXiv:2104.11222 (clean-fid, and what the other does to FID).
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLEAN_FID, TORCH_FIDELITY = "clean-fid", "torch-fidelity"


def clean_fid(image: np.ndarray, size: int) -> Tensor:
    """uint8 [h, w, 3] -> float32 [3, size, size], from 0 to 255."""
    planes = (Image.fromarray(plane.astype(np.float32)) for plane in image.transpose(2, 0, 1))
    scaled = [np.asarray(plane.resize((size, size), Image.Resampling.BICUBIC)) for plane in planes]
    return torch.from_numpy(np.stack(scaled).clip(0, 255))


def torch_fidelity(image: np.ndarray, size: int) -> Tensor:
    """uint8 [h, w, 3] -> float32 [3, size, size], from 0 to 255."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float()
    # Columns before rows, as TensorFlow does it: the other order rounds differently.
    return _stretched(_stretched(pixels, size).mT, size).mT


def _stretched(pixels: Tensor, size: int) -> Tensor:
    """The last dimension, scaled to `size`; positions are computed in float32, as TensorFlow does."""
    place = torch.arange(size, dtype=torch.float32) * torch.tensor(pixels.shape[-1] / size)
    low = place.long()
    here, after = pixels[..., low], pixels[..., (low + 1).clamp_max(pixels.shape[-1] - 1)]
    return here + (after - here) * (place - low)


RESIZE_FILTERS: Mapping[str, Callable[[np.ndarray, int], Tensor]] = {
    CLEAN_FID: clean_fid,
    TORCH_FIDELITY: torch_fidelity,
}


def scaled_images(images: np.ndarray, resize: str, size: int) -> Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, size, size]; one at a time, so that large images take little memory.

    Args:
        resize: a name in `RESIZE_FILTERS`.
    """
    return torch.stack([RESIZE_FILTERS[resize](image, size) for image in images])
