"""Histograms of oriented gradients as a matcher: a floor that looks at the images, and has learnt nothing.

Source: Dalal and Triggs, 2005, doi:10.1109/CVPR.2005.177; each cell under the norms of the four blocks that hold it,
side by side, as in Felzenszwalb et al., 2010, doi:10.1109/TPAMI.2009.167.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize, pad, unfold

from d2f_core.correspondence.matcher import Matcher
from d2f_core.correspondence.matching import Grid
from d2f_core.correspondence.preparation import LARGEST, Preparation

NAME = "HOG"
BINS = 9
"""Of the gradient's direction, from 0 to 180 degrees."""
CELL = 14
"""Pixels to a side of a cell, of which each is a token; fewer on a grid so fine that an image would be too large."""
CLIP = 0.2
"""Largest share of one number in a block's length."""
AROUND = 1
"""Cells to each side that describe a token too."""


def gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Size and direction in [0, pi) of the gradient at each pixel, [images, h, w] both, of the channel where it is the
    largest; images are [images, channels, h, w]."""
    wide = pad(images, (1, 1, 1, 1), mode="replicate")
    x, y = wide[:, :, 1:-1, 2:] - wide[:, :, 1:-1, :-2], wide[:, :, 2:, 1:-1] - wide[:, :, :-2, 1:-1]
    size, channel = torch.hypot(x, y).max(dim=1, keepdim=True)
    x, y = (each.gather(1, channel)[:, 0] for each in (x, y))
    return size[:, 0], torch.atan2(y, x).remainder(math.pi)


def histograms(images: Tensor, cell: int = CELL) -> Tensor:
    """Histograms [images, BINS, rows, columns] of cells; a gradient counts in the two nearest directions."""
    size, direction = gradients(images)
    place = direction * BINS / math.pi - 0.5
    apart = (place[:, None] - torch.arange(BINS, dtype=place.dtype)[:, None, None]).abs()
    share = (1 - torch.minimum(apart, BINS - apart)).clamp(min=0)
    return avg_pool2d(share * size[:, None], cell)


def hog(images: Tensor, cell: int = CELL) -> Tensor:
    """Descriptors [images, rows * columns, channels] of cells: their histograms and those around, each under the norms
    of its four blocks of 2 x 2 cells."""
    found = histograms(images, cell)
    energy = pad(found.square().sum(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    lengths = (4 * avg_pool2d(energy, 2, stride=1) + 1e-6).sqrt()
    rows, columns = found.shape[2:]
    blocks = [lengths[:, :, top : top + rows, left : left + columns] for top in (0, 1) for left in (0, 1)]
    cells = torch.cat([(found / length).clamp(max=CLIP) for length in blocks], dim=1)
    side = 2 * AROUND + 1
    return unfold(pad(cells, (AROUND,) * 4), side).transpose(1, 2)


def hog_matcher(grid: Grid, fit: Literal["stretch", "pad"] = "stretch") -> Matcher:
    """It answers on a grid as another matcher does; a cell is as large as a patch of DINOv2, if that can be."""
    cell = min(CELL, LARGEST // grid[0])
    preparation = Preparation(size=cell * grid[0], normalisation="none", fit=fit)

    def features(images: Sequence[np.ndarray]) -> Tensor:
        return normalize(hog(preparation.pixels(images), cell), dim=-1)

    return Matcher(name=NAME, preparation=preparation, grid=grid, features=features)
