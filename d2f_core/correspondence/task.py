"""The training task: a micro-batch of images and their teachers' features -> the loss of all its pairs.

One forward pass of n images gives the n (n - 1) / 2 pairs between them, in both directions, so the micro-batch's size
is part of what is computed. The loss of an image is the mean over the pairs that it is in; the mean over images is the
mean over pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from d2f_core.correspondence import distillation
from d2f_core.correspondence.config import DistillationConfig, MatcherConfig
from d2f_core.correspondence.matching import Grid, similarity
from d2f_core.correspondence.preparation import NORMALISATIONS
from d2f_core.correspondence.student import add_adapters, load_network, patch_size, tokens
from d2f_core.correspondence.teachers import fuse, resample
from d2f_core.data.arrays import table_to_arrays

PIXELS = "pixels"


@dataclass(frozen=True, kw_only=True)
class TeacherColumn:
    """Where a table holds the features of a teacher."""

    name: str
    """Of the column: float16 [tokens, channels]."""
    grid: Grid


class MatcherTask:
    """The task on one worker's device. The training loop calls its methods."""

    def __init__(
        self,
        config: MatcherConfig,
        teachers: Sequence[TeacherColumn],
        *,
        normalisation: str,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        """Build the student.

        Args:
            teachers: their columns in the table, in the order of the distillation's `shares`.
            normalisation: of the table's pixels, a name in `preparation.NORMALISATIONS`.
            dtype: that the student computes in.
        """
        network = load_network(config.student)
        self.patch = patch_size(network, config.student.base)
        self.module: nn.Module = add_adapters(network, config.student, seed=seed)
        self._config, self._teachers, self._dtype, self._device = config, tuple(teachers), dtype, device
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in NORMALISATIONS[normalisation])

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table that are read."""
        return (PIXELS, *(teacher.name for teacher in self._teachers))

    def to_batch(self, table: pa.Table) -> dict[str, Any]:
        """Rows of a micro-batch -> what the loss needs, on the device."""
        arrays = table_to_arrays(table, self.columns)
        pixels = torch.from_numpy(np.ascontiguousarray(arrays[PIXELS])).permute(0, 3, 1, 2).float()
        features = [torch.from_numpy(arrays[teacher.name]) for teacher in self._teachers]
        return {
            "pixels": ((pixels / 255 - self._mean) / self._std).to(self._device),
            "features": [each.to(self._device) for each in features],
        }

    def loss(self, network: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
        """The loss of each image, float32 [micro-batch]."""
        found, grid = tokens(network, batch["pixels"].to(self._dtype), self.patch)
        config = self._config.distillation
        return config.weight * distillation_loss(found, grid, self._targets(batch["features"]), config)

    def _targets(self, features: Sequence[Tensor]) -> list[tuple[Tensor, Grid]]:
        return [(each, teacher.grid) for each, teacher in zip(features, self._teachers, strict=True)]


def distillation_loss(
    student: Tensor, grid: Grid, teachers: Sequence[tuple[Tensor, Grid]], config: DistillationConfig
) -> Tensor:
    """The distillation loss of each image of a micro-batch, float32 [images].

    Args:
        student: features [images, tokens, channels] on `grid`.
        teachers: features [images, tokens, channels] of each teacher, with its grid.
    """
    with torch.no_grad():
        source, target = fused(teachers, grid, config)
    first, second = distillation.all_pairs(len(student))
    measure = loss_of(config, grid)
    losses = []
    # Pair by pair: a distribution on the finer grid is the largest thing here, and need not be held for all.
    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        with torch.no_grad():
            forward, backward = (
                distillation.teacher_distribution(
                    source[a : a + 1], target[b : b + 1],
                    grid=grid, temperature=config.teacher_temperature, finer=config.finer,
                )
                for a, b in ((one, other), (other, one))
            )  # fmt: skip
        cosines = similarity(student[one : one + 1], student[other : other + 1])
        losses.append(distillation.pair_loss(cosines, forward, backward, measure, cycle=config.cycle))
    return per_image(torch.cat(losses), first, second, len(student))


def fused(teachers: Sequence[tuple[Tensor, Grid]], grid: Grid, config: DistillationConfig) -> tuple[Tensor, Tensor]:
    """The teachers' features on the student's grid, and on the grid `finer` times as fine; [images, tokens, channels].

    Each teacher is brought to the finer grid from its own, which may be finer than the student's.
    """
    shares = config.shares or (1.0,) * len(teachers)
    fine = (grid[0] * config.finer, grid[1] * config.finer)
    coarse, finer = (
        fuse([resample(features.float(), own, to) for features, own in teachers], shares) for to in (grid, fine)
    )
    return coarse, finer


def loss_of(config: DistillationConfig, grid: Grid) -> Callable[[Tensor, Tensor], Tensor]:
    """The configured loss of (cosines, distribution)."""
    on_grid = {"grid": grid} if config.loss in ("soft_argmax", "gaussian_cross_entropy") else {}
    return partial(getattr(distillation, config.loss), temperature=config.temperature, **on_grid)


def per_image(losses: Tensor, first: Tensor, second: Tensor, images: int) -> Tensor:
    """Losses of pairs [pairs] -> for each image the mean over the pairs that it is in, [images]; 0 for one in none."""
    places = torch.cat([first, second]).to(losses.device)
    total = losses.new_zeros(images).index_add_(0, places, losses.repeat(2))
    count = losses.new_zeros(images).index_add_(0, places, torch.ones_like(losses).repeat(2))
    return total / count.clamp(min=1)
