"""A teacher's features depend on the image, its key and its caption alone, and cost no more than they must."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from d2f_core.correspondence.convolution_teacher import ConvolutionTeacher
from d2f_core.correspondence.diffusion_teacher import (
    DiffusionReading,
    DiffusionTeacher,
    described_shape,
    prompt_of,
    read_block,
)
from d2f_core.correspondence.matching import similarity, unit
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.teachers import (
    Picture,
    TeacherError,
    TransformerTeacher,
    fuse,
    fuse_by_rows,
    resample,
)
from d2f_core.model.base import resolve_base
from tests.correspondence.tiny_transformers import write
from tests.model.tiny_sd import write_tiny

HALF = Preparation(size=64, normalisation="half")


def pictures(count: int = 3) -> list[Picture]:
    draw = np.random.default_rng(0)
    return [
        Picture(
            pixels=draw.integers(0, 256, (40 + 5 * number, 60, 3), dtype=np.uint8), key=f"k{number}", category="cat"
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return resolve_base(str(write_tiny(tmp_path_factory.mktemp("base") / request.param, request.param)))


def test_a_transformers_teacher_gives_the_tokens_of_its_block(tmp_path: Path) -> None:
    teacher = TransformerTeacher("dino", str(write(tmp_path, "dinov2")), Preparation(size=42), layers=2)
    assert (teacher.grid, teacher.channels) == ((3, 3), 24)
    found = teacher.features(pictures())
    assert found.shape == (3, 9, 24)
    assert_close(teacher.features(pictures()[1:2]), found[1:2])
    with pytest.raises(TeacherError, match=r"size=40 .* Use 28"):
        TransformerTeacher("dino", str(tmp_path), Preparation(size=40))


def test_a_diffusion_teachers_features_are_functions_of_image_key_and_seed(base) -> None:
    reading = DiffusionReading(block="up_blocks.0", timesteps=(51, 101))
    teacher = DiffusionTeacher("sd", base, HALF, reading)
    found = teacher.features(pictures())
    assert found.shape == (3, teacher.grid[0] * teacher.grid[1], teacher.channels) and found.dtype == torch.float32
    assert torch.equal(teacher.features(pictures()), found), "no noise of its own"
    assert_close(teacher.features(pictures()[::-1]), found.flip(0), rtol=0, atol=2e-5)
    assert_close(teacher.features(pictures()[2:]), found[2:], rtol=0, atol=2e-5)
    for other in (
        DiffusionTeacher("sd", base, HALF, replace(reading, seed=1)).features(pictures()),
        teacher.features([replace(picture, key="another") for picture in pictures()]),
    ):
        assert (other - found).abs().max() > 1e-3


def test_features_are_the_mean_over_the_timesteps(base) -> None:
    reading = DiffusionReading(block="up_blocks.0", timesteps=(51, 101))
    both = DiffusionTeacher("sd", base, HALF, reading).features(pictures())
    each = [
        DiffusionTeacher("sd", base, HALF, replace(reading, timesteps=(step,))).features(pictures())
        for step in reading.timesteps
    ]
    assert_close((each[0] + each[1]) / 2, both, rtol=0, atol=2e-5)


def test_the_image_is_encoded_once_and_nothing_after_the_block_is_computed(base, monkeypatch) -> None:
    teacher = DiffusionTeacher("sd", base, HALF, DiffusionReading(block="up_blocks.0", timesteps=(51, 101, 151, 201)))
    seen: list[tuple[str, int]] = []
    for name in ("conv_in", "up_blocks.0", "up_blocks.1", "conv_out"):
        teacher._unet.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: seen.append((name, len(inputs[0]) if inputs else 0)), prepend=True
        )
    encoded = []
    network = teacher._autoencoder.network
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    teacher.features(pictures(2))
    assert encoded == [2] and [name for name, _ in seen] == ["conv_in", "up_blocks.0"] and seen[0][1] == 8


def test_sdxl_is_told_the_images_size_only_when_asked(tmp_path: Path) -> None:
    base = resolve_base(str(write_tiny(tmp_path / "sdxl", "sdxl")))
    reading = DiffusionReading(block="up_blocks.0", timesteps=(51,))
    without = DiffusionTeacher("sd", base, HALF, reading).features(pictures())
    told = DiffusionTeacher("sd", base, HALF, replace(reading, micro_conditioning=True)).features(pictures())
    assert (without - told).abs().max() > 1e-4


def test_the_papers_input_of_980_pixels_gives_the_students_grid(tmp_path: Path) -> None:
    """980 pixels, 122 latents, 61, 31: no multiple of anything, and DINOv2 has 434 / 14 = 31 too."""
    base = resolve_base(str(write_tiny(tmp_path / "sdxl", "sdxl")))
    reading = DiffusionReading(block="up_blocks.0.attentions.0", timesteps=(51,))
    preparation = Preparation(size=980, normalisation="half")
    teacher = DiffusionTeacher("sdxl", base, preparation, reading)
    assert teacher.grid == (31, 31)
    assert described_shape(base, reading.block, 980) == (31, 31, teacher.channels), "and so it is told before"


def test_what_a_diffusion_teacher_is_told() -> None:
    picture = Picture(pixels=np.zeros((1, 1, 3), np.uint8), key="a", category="cat", caption="my cat")
    assert [prompt_of(picture, mode) for mode in ("empty", "generic", "category", "caption")] == [
        "", "a photo", "a photo of a cat", "my cat",
    ]  # fmt: skip
    with pytest.raises(TeacherError, match=r"image 'b' has no category.*Use prompt='generic'"):
        prompt_of(Picture(pixels=picture.pixels, key="b"), "category")


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (DiffusionReading(block="up_blocks.9"), "has no module 'up_blocks.9'"),
        (DiffusionReading(timesteps=()), "at least one, from 0 to 999"),
        (DiffusionReading(timesteps=(1000,)), "at least one, from 0 to 999"),
    ],
)
def test_a_reading_that_cannot_be_is_refused(base, reading: DiffusionReading, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        DiffusionTeacher("sd", base, HALF, reading)
    with pytest.raises(TeacherError, match="Use 'half'"):
        DiffusionTeacher("sd", base, Preparation(size=64), DiffusionReading(block="up_blocks.0"))


def test_a_block_that_is_never_computed_is_refused() -> None:
    network = torch.nn.Sequential(torch.nn.Identity())
    network.add_module("unused", torch.nn.Identity())
    network.forward = lambda x: x  # type: ignore[method-assign,assignment]
    with pytest.raises(TeacherError, match="'unused' is not computed"):
        read_block(network, "unused", torch.zeros(1))


def test_a_fusions_cosines_are_the_teachers_weighted_by_their_shares() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 6, width, generator=draw) * size for width, size in ((3, 100.0), (50, 0.01)))
    found = fuse([first, second], [3, 1])
    assert_close(found.norm(dim=-1), torch.ones(2, 6))
    wanted = 0.75 * similarity(first[:1], first[1:]) + 0.25 * similarity(second[:1], second[1:])
    assert_close(similarity(found[:1], found[1:]), wanted)
    for shares in ([1.0], [1.0, 0.0]):
        with pytest.raises(TeacherError, match="give one above 0 for each"):
            fuse([first, second], shares)


def test_the_published_fusion_shares_by_channels() -> None:
    """1280 channels beside 768: 62.5 percent of the energy, where fusion by tokens gives each a half."""
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, 961, width, generator=draw) for width in (1280, 768)]
    rows = fuse_by_rows(parts, (31, 31))
    assert rows[..., :1280].square().sum(dim=-1).mean().item() == pytest.approx(0.625, abs=0.005)
    assert fuse(parts, [1, 1])[..., :1280].square().sum(dim=-1).mean().item() == pytest.approx(0.5, abs=1e-6)
    channel = parts[0][0, :, 7].reshape(31, 31)
    wanted = channel / channel.norm(dim=1, keepdim=True)
    ratio = rows[0, :, 7].reshape(31, 31) / wanted
    other = parts[0][0, :, 8].reshape(31, 31)
    assert_close(ratio, rows[0, :, 8].reshape(31, 31) / (other / other.norm(dim=1, keepdim=True)))


def test_features_are_brought_to_another_grid() -> None:
    features = torch.randn(2, 12, 5)
    assert resample(features, (3, 4), (3, 4)) is features
    found = resample(unit(features), (3, 4), (6, 8))
    assert found.shape == (2, 48, 5)
    assert_close(resample(torch.ones(1, 4, 2), (2, 2), (5, 7)), torch.ones(1, 35, 2))


def test_a_convolutional_teacher_gives_its_blocks_side_by_side() -> None:
    preparation = Preparation(size=64, normalisation="efficientnet-lite")
    teacher = ConvolutionTeacher("lite0", preparation)
    found = teacher.features(pictures())
    assert teacher.grid == (4, 4) and teacher.channels == 112 + 192 and found.shape == (3, 16, 304)
    assert_close(found.norm(dim=-1), torch.ones(3, 16))
    assert_close(found[..., :112].norm(dim=-1), torch.full((3, 16), 0.5**0.5))
    assert_close(teacher.features(pictures()[1:2]), found[1:2], rtol=0, atol=1e-5)
    alone = ConvolutionTeacher("lite0", preparation, blocks=(10,)).features(pictures())
    assert_close(alone * 0.5**0.5, found[..., :112], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("preparation", "blocks", "message"),
    [
        (Preparation(size=64), (10,), "needs normalisation='efficientnet-lite'"),
        (Preparation(size=60, normalisation="efficientnet-lite"), (10,), "multiple of 16"),
        (Preparation(size=64, normalisation="efficientnet-lite"), (16,), "from 0 to 15"),
        (Preparation(size=64, normalisation="efficientnet-lite"), (), "from 0 to 15"),
    ],
)
def test_a_convolutional_teacher_that_cannot_be_is_refused(preparation: Preparation, blocks, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        ConvolutionTeacher("lite0", preparation, blocks=blocks)
