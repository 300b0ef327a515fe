"""Projects features onto a few fixed random directions, so that a covariance from few images is well determined."""

from functools import lru_cache

import numpy as np


def projected_width(width: int, dimensions: int) -> int:
    """Features per image after a projection onto `dimensions`; 0, or at least the network's width: no projection.

    Raises:
        ValueError: `dimensions` is negative.
    """
    if dimensions < 0:
        raise ValueError(f"dimensions={dimensions} must be at least 1, or 0 for all of the network's.")
    return min(dimensions or width, width)


def features_name(network: str, width: int, dimensions: int = 0) -> str:
    """A network's name and the dimensions that its features have when measured: a suffix for metric names."""
    return f"{network}_{projected_width(width, dimensions)}d"


def project(features: np.ndarray, dimensions: int) -> np.ndarray:
    """Features [n, width] on fixed orthonormal directions, float64 [n, projected_width(width, dimensions)]."""
    features = np.asarray(features, np.float64)
    width = projected_width(features.shape[1], dimensions)
    return features if width == features.shape[1] else features @ _directions(features.shape[1], width)


@lru_cache(maxsize=4)
def _directions(width: int, dimensions: int) -> np.ndarray:
    """Orthonormal columns, float64 [width, dimensions]: the same on every machine and in every process."""
    import torch  # drew them from the start; whoever measures unprojected features starts without it

    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(width, dimensions, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].numpy()
