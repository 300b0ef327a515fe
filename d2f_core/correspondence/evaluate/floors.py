"""Predictions without a look at the images: what a matcher must beat."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2f_core.correspondence import pck
from d2f_core.correspondence.evaluate.measure import Predict, both
from d2f_core.data.sources.pair_sample import PairSample


def floors(seed: int = 0) -> dict[str, Predict]:
    """Predictions by name."""
    draw = np.random.default_rng(seed)

    def rows(values: Any, count: int) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).expand(count, -1)

    def random(pair: PairSample, points: Tensor) -> Tensor:
        box = rows(both(pair)[1].box, len(points))
        return pck.random_in_box(box, torch.from_numpy(draw.random((len(points), 2))))

    def same_pixel(pair: PairSample, points: Tensor) -> Tensor:
        source, target = both(pair)
        return pck.same_pixel(points.double(), rows(source.size, len(points)), rows(target.size, len(points)))

    def box_copy(pair: PairSample, points: Tensor) -> Tensor:
        source, target = both(pair)
        return pck.box_copy(points.double(), rows(source.box, len(points)), rows(target.box, len(points)))

    def sure(guess: Callable[[PairSample, Tensor], Tensor]) -> Predict:
        return lambda pair, points: (guess(pair, points), torch.ones(len(points)))

    return {"random": sure(random), "same pixel": sure(same_pixel), "box copy": sure(box_copy)}
