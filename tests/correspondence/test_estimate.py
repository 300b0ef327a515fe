"""An estimate of a distillation counts what a training computes and holds, by shapes alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from d2f_core.correspondence.config import DistillationConfig, MatcherConfig, StudentConfig
from d2f_core.correspondence.distillation import all_pairs
from d2f_core.correspondence.embed.config import EmbedConfig, TeacherConfig
from d2f_core.correspondence.embed.spec import EmbedSpec
from d2f_core.correspondence.estimate.config import EstimateDistillConfig
from d2f_core.correspondence.estimate.counting import (
    TeacherCount,
    count_teacher,
    loss_pass,
    student_on_meta,
    student_pass,
)
from d2f_core.correspondence.estimate.job import estimate, report
from d2f_core.correspondence.student import load_network
from d2f_core.correspondence.targets.config import EmbedPairsConfig
from d2f_core.correspondence.targets.spec import PairsSpec, row_bytes
from d2f_core.correspondence.task import distillation_loss
from d2f_core.data.schema import is_array
from d2f_core.model import footprint
from d2f_core.train.config import TrainConfig
from tests.correspondence.tiny_transformers import write
from tests.model.tiny_sd import write_tiny

CPU = TrainConfig(num_steps=10, global_batch_size=8, micro_batch_size=4)


def config(tmp_path: Path) -> EstimateDistillConfig:
    base = str(write(tmp_path / "base", "dinov2"))
    return EstimateDistillConfig(
        matcher=MatcherConfig(student=StudentConfig(base=base, dropout=0.0)), size=28, images=100,
        train=CPU, tflops=1.0,
        teachers=(
            TeacherConfig(name="dino", uri=base, size=42),
            TeacherConfig(name="lite0", kind="efficientnet-lite0", size=64, normalisation="efficientnet-lite"),
        ),
    )  # fmt: skip


def test_the_papers_student_trains_what_the_paper_says() -> None:
    student = student_on_meta(MatcherConfig(student=StudentConfig(base="dinov2-b")))
    assert sum(footprint.sizes(student, trained=True)) == 294_912
    giant = student_on_meta(MatcherConfig(student=StudentConfig(base="dinov2-g", layers=2, first_block=1)))
    assert sum(footprint.sizes(giant, trained=True)) == 2 * 2 * 1536 * 8, "one block"


def test_a_pass_without_contents_costs_what_a_real_one_costs(tmp_path: Path) -> None:
    made = config(tmp_path)
    counted = student_pass(student_on_meta(made.matcher), batch=4, size=28, dtype=torch.float32)
    network = load_network(made.matcher.student)
    flops = footprint.forward_flops(network, lambda net: net(pixel_values=torch.zeros(4, 3, 28, 28)))
    assert flops < counted.forward_flops < 2 * flops, "the adapters are further products"
    assert counted.flops > 1.5 * counted.forward_flops and counted.peak_bytes >= counted.held_bytes > 0


@pytest.mark.parametrize("finer", [1, 2])
def test_the_losses_of_all_pairs_are_counted_as_they_are_computed(finer: int) -> None:
    made = MatcherConfig(student=StudentConfig(base="x"), distillation=DistillationConfig(finer=finer))
    teachers = [TeacherCount(grid=(4, 4), channels=50, flops=0), TeacherCount(grid=(2, 2), channels=70, flops=0)]
    counted = loss_pass(made, teachers, channels=6, grid=(3, 3), images=5)

    def real() -> torch.Tensor:
        student = torch.randn(5, 9, 6, requires_grad=True)
        features = [(torch.randn(5, 16, 50).half(), (4, 4)), (torch.randn(5, 4, 70).half(), (2, 2))]
        return distillation_loss(student, (3, 3), features, all_pairs(5), (1.0, 1.0), made.distillation)

    measured = footprint.measure(nn.Identity(), real)
    assert counted.flops == measured.flops
    assert 0.9 * measured.peak_bytes < counted.peak_bytes < 1.1 * measured.peak_bytes


def test_teachers_give_the_grids_and_bytes_that_embedding_stores(tmp_path: Path) -> None:
    made = config(tmp_path)
    counts = {teacher.column: count_teacher(teacher) for teacher in made.teachers}
    assert [each.grid for each in counts.values()] == [(3, 3), (4, 4)] and all(each.flops for each in counts.values())
    shapes = {name: (each.grid[0] * each.grid[1], each.channels) for name, each in counts.items()}
    embed = EmbedConfig(teachers=made.teachers, size=28)
    stored = sum(
        field.type.byte_width
        for field in EmbedSpec(config=embed, shapes=shapes, points=0, fingerprint={}, inputs={}).schema()
        if is_array(field)
    )
    found = estimate(made)
    assert 0 < found.row_bytes - stored <= 200
    text = report(made, found)
    assert "micro-batch 4 (6 pairs)" in text and "- lite0: " in text and f"| **{CPU.zero_stage}** |" in text


def test_given_pairs_are_two_images_each_and_stored_with_their_targets(tmp_path: Path) -> None:
    made = config(tmp_path)
    images, pairs = estimate(made), estimate(replace(made, pairs=1000))
    spec = PairsSpec(config=EmbedPairsConfig(targets=made.targets), size=28, fingerprint={}, inputs={})
    assert 0 < pairs.pair_bytes - row_bytes(list(spec.schema())) <= 200 and images.pair_bytes == 0
    assert pairs.pass_flops > 1.5 * images.pass_flops and pairs.forward_flops == images.forward_flops
    assert "micro-batch 4 (4 pairs)" in report(replace(made, pairs=1000), pairs)
    assert "GB the table of pairs" in report(replace(made, pairs=1000), pairs)


def test_a_diffusion_teacher_is_counted_up_to_its_block_at_each_level_of_noise(tmp_path: Path) -> None:
    base = str(write_tiny(tmp_path / "sd", "sd15"))
    once, twice = (
        count_teacher(TeacherConfig(
            name="sd", kind="diffusion", uri=base, size=64, normalisation="half", block=block, timesteps=times
        ))
        for block, times in (("up_blocks.0", (1,)), ("up_blocks.0", (1, 2)))
    )  # fmt: skip
    deeper = count_teacher(TeacherConfig(
        name="sd", kind="diffusion", uri=base, size=64, normalisation="half", block="down_blocks.0", timesteps=(1,)
    ))  # fmt: skip
    assert once.grid == twice.grid and once.flops < twice.flops < 2 * once.flops, "the autoencoder encodes once"
    assert deeper.flops < once.flops


def test_sizes_that_no_patch_divides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size=30 must be a multiple of the student's patch of 14 pixels"):
        estimate(replace(config(tmp_path), size=30))
    with pytest.raises(ValueError, match="images=0 must be at least 1"):
        replace(config(tmp_path), images=0)
