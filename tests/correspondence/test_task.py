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
from d2f_core.correspondence.matching import enlarge, sample, similarity, unit
from d2f_core.correspondence.multiview import soft_targets
from d2f_core.correspondence.student import tokens
from d2f_core.correspondence.task import (
    PIXELS,
    MatcherTask,
    TeacherColumn,
    distillation_loss,
    loss_of,
    per_image,
    shares_of,
)
from d2f_core.correspondence.teachers import fuse
from d2f_core.data.arrays import arrays_to_table
from d2f_core.data.schema import array_field
from tests.correspondence.tiny_transformers import write

IMAGES, SIDE = 4, 42
GRID, OTHER = (3, 3), (6, 6)
TEACHERS = (TeacherColumn(name="a", grid=OTHER), TeacherColumn(name="b", grid=GRID))
CONFIG = DistillationConfig(shares={"b": 1.0, "a": 3.0})


def table(seed: int = 0) -> pa.Table:
    draw = np.random.default_rng(seed)
    arrays = {
        PIXELS: draw.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8),
        "features_a": draw.standard_normal((IMAGES, 36, 5)).astype(np.float16),
        "features_b": draw.standard_normal((IMAGES, 9, 7)).astype(np.float16),
    }
    fields = [array_field(name, str(values.dtype), values.shape[1:]) for name, values in arrays.items()]
    made = arrays_to_table(arrays, pa.schema(fields))
    return made.append_column("epoch", pa.array([0] * IMAGES)).append_column("row", pa.array(range(IMAGES)))


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
    assert distillation_loss(student, GRID, [(student, GRID)], d.all_pairs(3), [1.0], config).abs().max() < 1e-6


def test_an_images_loss_is_the_mean_over_its_pairs() -> None:
    first, second = d.all_pairs(3)
    losses = [torch.tensor([value]) for value in (1.0, 2.0, 6.0)]  # 0-1, 0-2, 1-2
    student = torch.zeros(3, 1, 1)
    assert per_image(losses, first, second, student).tolist() == [1.5, 3.5, 4.0]
    assert per_image(losses[:1], first[:1], second[:1], student).tolist() == [1.0, 1.0, 0.0]
    assert per_image([], first[:0], second[:0], student).tolist() == [0.0] * 3


POINTS = 12


def views(seed: int = 0) -> pa.Table:
    """Two things, two views each."""
    draw = np.random.default_rng(seed)
    arrays = {
        "mesh": ["chair-0", "chair-1", "chair-0", "chair-1"],
        "surface_points": draw.uniform(0, SIDE, (IMAGES, POINTS, 2)).astype(np.float32),
        "surface_visible": draw.random((IMAGES, POINTS)) < 0.8,
    }
    whole = table(seed)
    for name, values in arrays.items():
        if isinstance(values, np.ndarray):
            kind = array_field(name, str(values.dtype), values.shape[1:])
            column = arrays_to_table({name: values}, pa.schema([kind])).column(0)
        else:
            kind, column = name, pa.array(values)
        whole = whole.append_column(kind, column)
    return whole


def refining(tmp_path: Path, distil: float, **fields: int) -> MatcherTask:
    student = StudentConfig(base=str(write(tmp_path / "base", "dinov2")), dropout=0.0)
    multi_view = MultiViewConfig(weight=1.0, **{"least_points": 1, **fields})
    config = MatcherConfig(student=student, distillation=replace(CONFIG, weight=distil), multi_view=multi_view)
    return MatcherTask(config, TEACHERS, normalisation="imagenet", seed=0)


def test_the_multi_view_loss_is_the_cross_entropy_with_the_true_tokens(tmp_path: Path) -> None:
    made = refining(tmp_path, 0.0, points=100)
    assert not any(name.startswith("features") for name in made.columns), "what is not needed is not read"
    batch = made.to_batch(views())
    student = tokens(made.module, batch["pixels"], 14)[0]
    points, seen = batch["views"].points, batch["views"].seen
    pairs = []
    for i, j in ((0, 2), (1, 3)):
        shared = seen[i] & seen[j]
        ways = []
        for a, b in ((i, j), (j, i)):
            query = sample(unit(student[a])[None], GRID, (points[a] / 14 - 0.5)[None])[0][shared]
            logits = torch.log_softmax(similarity(query, student[b]) / 0.05, dim=-1)
            truth = soft_targets(points[b][shared], GRID, (SIDE, SIDE))
            ways.append(-(truth * logits).sum(dim=-1).mean())
        pairs.append((ways[0] + ways[1]) / 2)
    found = made.loss(made.module, batch)
    assert_close(found, torch.stack([pairs[0], pairs[1], pairs[0], pairs[1]]))


def test_views_of_one_thing_are_not_distilled_beside_the_truth(tmp_path: Path) -> None:
    """0-2 and 1-3 are known exactly; the teachers teach the other four pairs."""
    both, alone = refining(tmp_path, 2.0), refining(tmp_path, 0.0)
    batch = both.to_batch(views())
    student, grid = tokens(both.module, batch["pixels"], 14)
    pairs = torch.tensor([0, 0, 1, 2]), torch.tensor([1, 3, 2, 3])
    teachers = [(each, column.grid) for each, column in zip(batch["features"], TEACHERS, strict=True)]
    taught = distillation_loss(student, grid, teachers, pairs, [3.0, 1.0], CONFIG)
    assert_close(both.loss(both.module, batch), alone.loss(alone.module, batch) + 2 * taught)


def test_points_are_drawn_by_the_rows_key_alone(tmp_path: Path) -> None:
    made = refining(tmp_path, 0.0, points=3)
    whole, reverse = made.to_batch(views()), made.to_batch(views().take([3, 2, 1, 0]))
    assert torch.equal(whole["views"].order, reverse["views"].order.flip(0))
    assert len({tuple(order) for order in whole["views"].order.tolist()}) == IMAGES
    assert torch.equal(made.loss(made.module, whole), made.loss(made.module, made.to_batch(views())))


def test_a_micro_batch_without_a_pair_of_views_can_be_stepped_on(tmp_path: Path) -> None:
    made = refining(tmp_path, 0.0, least_points=POINTS + 1, points=64)
    loss = made.loss(made.module, made.to_batch(views()))
    assert loss.tolist() == [0.0] * IMAGES
    loss.mean().backward()
    assert all(not value.grad.any() for value in made.module.parameters() if value.grad is not None)


def test_shares_go_by_name() -> None:
    assert shares_of(TEACHERS, CONFIG) == [3.0, 1.0]
    assert shares_of(TEACHERS[::-1], CONFIG) == [1.0, 3.0]
    assert shares_of(TEACHERS, DistillationConfig()) == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"not one for each of the table's teachers, a, b\. Name each"):
        shares_of(TEACHERS, DistillationConfig(shares={"a": 1.0}))


def test_dropout_is_the_micro_batchs_own(tmp_path: Path) -> None:
    """The same on any worker and after any restart, whatever was drawn before."""
    student = StudentConfig(base=str(write(tmp_path / "base", "dinov2")), dropout=0.5)
    made = MatcherTask(MatcherConfig(student=student, distillation=CONFIG), TEACHERS, normalisation="imagenet", seed=0)
    for name, value in made.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(0))
    made.module.train()
    batch, other = made.to_batch(table()), made.to_batch(table().take([1, 0, 2, 3]))
    first = made.loss(made.module, batch)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(made.loss(made.module, batch), first)
    assert torch.equal(torch.rand(1), expected)
    assert batch["dropout"] != other["dropout"]
    made.module.eval()
    assert not torch.equal(made.loss(made.module, batch), first)


def test_a_row_that_stands_in_for_another_is_in_no_pair(tmp_path: Path) -> None:
    made = task(tmp_path)
    whole = table()
    reasons = pa.array([None, None, "damaged", None], pa.string())
    copied = whole.take([0, 1, 0, 3]).append_column("reason", reasons)
    found = made.loss(made.module, made.to_batch(copied))
    wanted = made.loss(made.module, made.to_batch(whole.take([0, 1, 3])))
    assert_close(found[[0, 1, 3]], wanted, rtol=1e-5, atol=1e-6)
    assert found[2] == 0


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
        (lambda: DistillationConfig(shares={"a": 1.0, "b": 0.0}), "must each be above 0"),
        (lambda: DistillationConfig(weight=-1.0), "from 0 on"),
        (lambda: MultiViewConfig(points=0), r"points=0 must be at least multi_view\.least_points=8"),
        (
            lambda: MatcherConfig(student=StudentConfig(base="b"), distillation=DistillationConfig(weight=0.0)),
            "are both 0",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
