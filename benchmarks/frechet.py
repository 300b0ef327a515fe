"""A Frechet distance between sets of images, in 64 dimensions of EfficientNet-Lite0's features.

Not FID: another network, and a fixed random projection of its 1280 features onto 64, so that a covariance of some 2,000
images is well determined. Compare figures of this module with each other only, and with the floor between two halves
of the real images. Computed as `pipelines.evaluate` does; see d2f_core.flow.evaluate.feature_networks for the wheels
it needs.
"""

import numpy as np
import torch
from torch import Tensor

from d2f_core.flow.evaluate.distances import FeatureMoments, frechet_distance
from d2f_core.flow.evaluate.feature_networks import EFFICIENTNET, load_features
from d2f_core.flow.evaluate.projection import project

NAME = "frechet_efficientnet_lite0_64d"
CHUNK, DIMENSIONS = 128, 64


class Features:
    """uint8 images [n, h, w, 3] -> float64 features [n, 64]."""

    def __init__(self) -> None:
        self._features = load_features(EFFICIENTNET)

    def __call__(self, images: Tensor) -> Tensor:
        found = np.concatenate([self._features(chunk.numpy()) for chunk in images.split(CHUNK)])
        return torch.from_numpy(project(found, DIMENSIONS))


def distance(first: Tensor, second: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians with the moments of two feature sets [n, d]."""
    return frechet_distance(FeatureMoments.of(first.numpy()), FeatureMoments.of(second.numpy()))
