"""The task's loss is the mean of its pairs' losses, written out, and trains the adapters alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.testing import assert_close

from d2f_core.correspondence import distillation as d
from d2f_core.correspondence.config import DistillationConfig, MatcherConfig, MultiViewConfig, StudentConfig
from d2f_core.correspondence.matching import enlarge, similarity, unit
from d2f_core.correspondence.student import tokens
from d2f_core.correspondence.task import PIXELS, MatcherTask, TeacherColumn, distillation_loss, loss_of, per_image
from d2f_core.correspondence.teachers import fuse
from d2f_core.data.arrays import arrays_to_table
from d2f_core.data.schema import array_field
from tests.correspondence.test_student import write

IMAGES, SIDE = 4, 42
GRID, OTHER = (3, 3), (6, 6)
TEACHERS = (TeacherColumn(name="features_a", grid=OTHER), TeacherColumn(name="features_b", grid=GRID))
CONFIG = DistillationConfig(shares=(3.0, 1.0))


def table(seed: int = 0) -> pa.Table:
    draw = np.random.default_rng(seed)
    arrays = {
        PIXELS: draw.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8),
        "features_a": draw.standard_normal((IMAGES, 36, 5)).astype(np.float16),
        "features_b": draw.standard_normal((IMAGES, 9, 7)).astype(np.float16),
    }
    fields = [array_field(name, str(values.dtype), values.shape[1:]) for name, values in arrays.items()]
    return arrays_to_table(arrays, pa.schema(fields))


def task(tmp_path: Path, config: DistillationConfig = CONFIG) -> MatcherTask:
    student = StudentConfig(base=str(write(tmp_path / "base", "dinov2")), dropout=0.0)
    return MatcherTask(MatcherConfig(student=student, distillation=config), TEACHERS, normalisation="imagenet", seed=0)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "soft_argmax", "gaussian_cross_entropy"])
@pytest.mark.parametrize(("finer", "cycle"), [(2, True), (1, False)])
def test_the_loss_is_the_mean_over_pairs_in_both_directions(tmp_path: Path, loss, finer: int, cycle: bool) -> None:
    config = replace(CONFIG, loss=loss, finer=finer, cycle=cycle)
    made = task(tmp_path, config)
    batch = made.to_batch(table())
    found = made.loss(made.module, batch)
    assert found.shape == (IMAGES,) and found.dtype == torch.float32
    student = tokens(made.module, batch["pixels"], 14)[0]
    a, b = (each.float() for each in batch["features"])
    size = (3 * finer, 3 * finer)
    fine = fuse([a if finer == 2 else _shrunk(a), enlarge(b, GRID, size)], (3, 1))
    coarse = fuse([_shrunk(a), b], (3, 1))
    measure = loss_of(config, GRID)
    wanted = []
    for i in range(IMAGES):
        for j in range(IMAGES):
            if i != j:
                there, back = (
                    d.sum_cells(torch.softmax(unit(coarse[x]) @ unit(fine[y]).T / 0.01, dim=-1), GRID, finer)
                    for x, y in ((i, j), (j, i))
                )
                each = measure(similarity(student[i], student[j]), there)
                weights = (there * back.T).sum(dim=1) if cycle else torch.ones(9)
                wanted.append((weights * each).sum() / weights.sum())
    assert_close(found.mean(), torch.stack(wanted).mean(), rtol=1e-5, atol=1e-6)


def _shrunk(features: torch.Tensor) -> torch.Tensor:
    """From 6 x 6 to 3 x 3: the mean of four, for centres fall on corners."""
    return features.unflatten(1, (3, 2, 3, 2)).mean(dim=(2, 4)).flatten(1, 2)


def test_only_adapters_have_gradients_and_a_step_lowers_the_loss(tmp_path: Path) -> None:
    made = task(tmp_path)
    batch = made.to_batch(table())
    optimizer = torch.optim.Adam([value for value in made.module.parameters() if value.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = made.loss(made.module, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with_gradient = [name for name, value in made.module.named_parameters() if value.grad is not None]
    assert with_gradient and all("lora_" in name for name in with_gradient)


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn() -> None:
    student = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(0))
    config = DistillationConfig(loss="kl", temperature=0.05, teacher_temperature=0.05, finer=1)
    assert distillation_loss(student, GRID, [(student, GRID)], config).abs().max() < 1e-6


def test_an_images_loss_is_the_mean_over_its_pairs() -> None:
    first, second = d.all_pairs(3)
    losses = torch.tensor([1.0, 2.0, 6.0])  # 0-1, 0-2, 1-2
    assert per_image(losses, first, second, 3).tolist() == [1.5, 3.5, 4.0]
    assert per_image(losses, first, second, 3).mean() == losses.mean()
    assert per_image(losses[:0], first[:0], second[:0], 1).tolist() == [0.0]


def test_pixels_are_normalised_like_those_of_every_other_job(tmp_path: Path) -> None:
    made = task(tmp_path)
    pixels = made.to_batch(table())["pixels"]
    value = np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)[2, 5, 7]
    assert_close(
        pixels[2, :, 5, 7],
        (torch.tensor(value) / 255 - torch.tensor((0.485, 0.456, 0.406))) / torch.tensor((0.229, 0.224, 0.225)),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistillationConfig(loss="reference_double_softmax"), "--no-distillation.cycle"),
        (lambda: DistillationConfig(temperature=0.0), r"distillation\.temperature=0\.0 must be above 0"),
        (lambda: DistillationConfig(teacher_temperature=float("nan")), "teacher_temperature=nan must be above 0"),
        (lambda: DistillationConfig(finer=0), r"finer=0 must be at least 1"),
        (lambda: DistillationConfig(shares=(1.0, 0.0)), "must each be above 0"),
        (lambda: DistillationConfig(weight=-1.0), "from 0 on"),
        (lambda: MultiViewConfig(points=0), "points=0 must be at least 1"),
        (
            lambda: MatcherConfig(student=StudentConfig(base="b"), distillation=DistillationConfig(weight=0.0)),
            "are both 0",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
