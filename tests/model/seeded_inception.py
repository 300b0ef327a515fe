"""An Inception-v3 whose weights a formula makes, and images for it: every machine has the same, without a file."""

import zlib

import numpy as np
import torch
from torch import Tensor

from d2f_core.model.inception import InceptionV3

SIZES = ((299, 299), (37, 53), (640, 200))
"""Heights and widths of the images: the network's own, and ones that are enlarged, shrunk and stretched."""


def _uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 from -1 to 1."""
    draw = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    return 2 * draw.random(shape, np.float32) - 1


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights that keep the size of the activations; scales and variances are from 0.5 to 1.5."""
    drawn = _uniform(name, shape)
    if len(shape) > 1:
        return drawn * np.float32(np.sqrt(6 / np.prod(shape[1:])))
    return drawn / 2 + 1 if name.endswith((".bn.weight", ".running_var")) else drawn / 8


def seeded_weights() -> dict[str, Tensor]:
    """The network's tensors by name, with the classifier's."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in InceptionV3().state_dict().items()}
    shapes |= {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    return {name: torch.from_numpy(_values(name, shape)) for name, shape in shapes.items()}


def seeded_images(height: int, width: int) -> np.ndarray:
    """Two images, uint8 [2, height, width, 3]: noise over a wave."""
    y, x = np.mgrid[0:height, 0:width]
    wave = 100 + 60 * np.sin(y / 9)[..., None] * np.cos(x / 7 + np.arange(3)[:, None, None]).transpose(1, 2, 0)
    noise = np.stack([_uniform(f"image {number}", (height, width, 3)) for number in range(2)])
    return (wave + 60 * noise).clip(0, 255).astype(np.uint8)
