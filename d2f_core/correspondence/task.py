"""The training task: a micro-batch of images and their teachers' features -> the loss of all its pairs.

One forward pass of n images gives the n (n - 1) / 2 pairs between them, in both directions, so the micro-batch's size
is part of what is computed. The loss of an image is the mean over the pairs that it is in, 0 for one in none; where all
images are in equally many pairs, the mean over images is the mean over pairs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from d2f_core.correspondence import distillation
from d2f_core.correspondence.config import DistillationConfig, MatcherConfig, MultiViewConfig, StudentConfig
from d2f_core.correspondence.matching import Grid, Size, sample, similarity, to_grid, unit
from d2f_core.correspondence.multiview import soft_targets
from d2f_core.correspondence.preparation import normalise
from d2f_core.correspondence.student import add_adapters, load_network, patch_size, tokens
from d2f_core.correspondence.teacher_columns import TeacherColumn, fused, shares_of
from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.plan_reader import EPOCH, REASON, ROW
from d2f_core.randomness import keyed_generator, sample_keys

PIXELS = "pixels"
VIEW_COLUMNS = ("mesh", "surface_points", "surface_visible")
"""Of a view: the thing it shows, and places of points of its surface, the same ones in all its views."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """Which images of a micro-batch show the same thing, and where its points lie in each."""

    things: Tensor
    """int64 [images]: equal for views of one thing."""
    points: Tensor
    """[images, points, 2] in pixels; point i of two views of one thing is one point of its surface."""
    seen: Tensor
    """bool [images, points]."""
    order: Tensor
    """int64 [images, points]: the order in which points are taken for pairs whose first image this is."""


def columns_of(config: MatcherConfig, teachers: Sequence[TeacherColumn]) -> tuple[str, ...]:
    """Columns of a table of features that a training reads: none for a loss without weight."""
    names = [teacher.column for teacher in teachers] if config.distillation.weight else []
    return (PIXELS, *names, *(VIEW_COLUMNS if config.multi_view.weight else ()))


def usable_rows(table: pa.Table) -> Tensor:
    """Which rows are themselves, bool [rows]."""
    if REASON not in table.column_names:
        return torch.ones(table.num_rows, dtype=torch.bool)
    return torch.tensor(table.column(REASON).is_null().to_pylist())


@contextmanager
def dropout_of(key: int, device: torch.device) -> Iterator[None]:
    """What torch draws within depends on the key alone: a micro-batch has the same dropout on any worker, and after any
    restart."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(key)
        yield


def dropout_key(seed: int, keys: Sequence[str]) -> int:
    """What the dropout of a micro-batch is drawn from: the key of its first row."""
    return int(keyed_generator(seed, keys[0], "dropout").integers(2**62))


def build_student(config: StudentConfig, seed: int) -> tuple[nn.Module, int]:
    """The student with new adapters, and the height and width of its patches in pixels."""
    network = load_network(config)
    return add_adapters(network, config, seed=seed), patch_size(network, config.base)


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
            teachers: their columns in the table.
            normalisation: of the table's pixels, a name in `preparation.NORMALISATIONS`.
            dtype: that the student computes in.
        """
        self.module, self.patch = build_student(config.student, seed)
        self._config, self._teachers, self._seed, self._dtype, self._device = config, teachers, seed, dtype, device
        self._normalisation = normalisation

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table that are read."""
        return columns_of(self._config, self._teachers)

    def to_batch(self, table: pa.Table) -> dict[str, Any]:
        """Rows of a micro-batch -> what the loss needs, on the device."""
        arrays = table_to_arrays(table, [*self.columns, EPOCH, ROW])
        keys = sample_keys(arrays[EPOCH], arrays[ROW])
        pixels = torch.tensor(arrays[PIXELS]).permute(0, 3, 1, 2).float()
        batch: dict[str, Any] = {
            "pixels": normalise(pixels, self._normalisation).to(self._device),
            "usable": usable_rows(table),
            "dropout": dropout_key(self._seed, keys),
        }
        if self._config.distillation.weight:
            batch["features"] = [torch.tensor(arrays[each.column]).to(self._device) for each in self._teachers]
        if self._config.multi_view.weight:
            batch["views"] = self._views(arrays, keys)
        return batch

    def _views(self, arrays: Mapping[str, Any], keys: Sequence[str]) -> Views:
        """What is known of the micro-batch's views; the order of points is drawn for each row by its key."""
        count = arrays["surface_points"].shape[1]
        order = [keyed_generator(self._seed, key, "points").permutation(count) for key in keys]
        things = np.unique(np.asarray(arrays["mesh"], dtype=str), return_inverse=True)[1]
        return Views(
            things=torch.from_numpy(things),
            points=torch.tensor(arrays["surface_points"]).to(self._device),
            seen=torch.tensor(arrays["surface_visible"]).to(self._device),
            order=torch.from_numpy(np.stack(order)).to(self._device),
        )

    def loss(self, network: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
        """The loss of each image, float32 [micro-batch]."""
        pixels, usable = batch["pixels"].to(self._dtype), batch["usable"]
        with dropout_of(batch["dropout"], pixels.device):
            found, grid = tokens(network, pixels, self.patch)
        first, second = distillation.all_pairs(len(found))
        both = usable[first] & usable[second]  # another row stands in for one that cannot be used
        pairs = first[both], second[both]
        total = found[:, 0, 0].float() * 0  # part of the graph: a micro-batch without a pair has gradients of zero
        if weight := self._config.multi_view.weight:
            views: Views = batch["views"]
            size = pixels.shape[3], pixels.shape[2]
            together = views.things[pairs[0]] == views.things[pairs[1]]
            same, pairs = ((pairs[0][chosen], pairs[1][chosen]) for chosen in (together, ~together))
            total = total + weight * multi_view_loss(found, grid, size, views, same, self._config.multi_view)
            # Where the truth is known, teachers only know less: they teach the other pairs.
        if weight := self._config.distillation.weight:
            teachers = [(each, column.grid) for each, column in zip(batch["features"], self._teachers, strict=True)]
            shares, config = shares_of(self._teachers, self._config.distillation), self._config.distillation
            total = total + weight * distillation_loss(found, grid, teachers, pairs, shares, config)
        return total


def distillation_loss(
    student: Tensor,
    grid: Grid,
    teachers: Sequence[tuple[Tensor, Grid]],
    pairs: tuple[Tensor, Tensor],
    shares: Sequence[float],
    config: DistillationConfig,
) -> Tensor:
    """The distillation loss of each image of a micro-batch, float32 [images].

    Args:
        student: features [images, tokens, channels] on `grid`.
        teachers: features [images, tokens, channels] of each teacher, with its grid.
        pairs: first and second image of each pair that is compared.
        shares: of the teachers in their fusion.
    """
    with torch.no_grad():
        source, target = fused(teachers, grid, shares, config)
    first, second = pairs
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
    return per_image(losses, first, second, student)


def multi_view_loss(
    student: Tensor, grid: Grid, size: Size, views: Views, pairs: tuple[Tensor, Tensor], config: MultiViewConfig
) -> Tensor:
    """The cross-entropy of matches with the true ones, float32 [images]: over pairs of views of one thing, the mean of
    both directions; 0 for an image in no such pair.

    Args:
        student: features [images, tokens, channels] on `grid`.
        size: width and height in the pixels that `views.points` are given in.
        pairs: first and second image of each pair of views of one thing.
    """
    features = unit(student)
    first, second, losses = [], [], []
    for one, other in zip(*(each.tolist() for each in pairs), strict=True):
        shared = views.seen[one] & views.seen[other]
        if int(shared.sum()) < config.least_points:
            continue
        chosen = views.order[one][shared[views.order[one]]][: config.points]
        ways = []
        for a, b in ((one, other), (other, one)):
            query = sample(features[a : a + 1], grid, to_grid(views.points[a][chosen], grid, size)[None])
            truth = soft_targets(views.points[b][chosen], grid, size)
            cosines = similarity(query, features[b : b + 1])[0]
            ways.append(distillation.cross_entropy(cosines, truth, config.temperature).mean())
        first.append(one)
        second.append(other)
        losses.append((ways[0] + ways[1])[None] / 2)
    return per_image(losses, torch.tensor(first).long(), torch.tensor(second).long(), student)


def loss_of(config: DistillationConfig, grid: Grid) -> Callable[[Tensor, Tensor], Tensor]:
    """The configured loss of (cosines, distribution)."""
    on_grid = {"grid": grid} if config.loss in ("soft_argmax", "gaussian_cross_entropy") else {}
    return partial(getattr(distillation, config.loss), temperature=config.temperature, **on_grid)


def per_image(losses: Sequence[Tensor], first: Tensor, second: Tensor, student: Tensor) -> Tensor:
    """Losses of pairs, [1] each -> for each image of `student` the mean over the pairs that it is in; 0 in no pair."""
    each = torch.cat([student.new_zeros(0, dtype=torch.float32), *losses])
    places = torch.cat([first, second]).to(student.device)
    total = each.new_zeros(len(student)).index_add(0, places, each.repeat(2))
    count = each.new_zeros(len(student)).index_add(0, places, torch.ones_like(each).repeat(2))
    return total / count.clamp(min=1)
