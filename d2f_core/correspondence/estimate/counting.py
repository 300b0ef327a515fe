"""Counts what students, teachers and losses compute and hold, from shapes alone: no weights, on tensors without
contents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from d2f_core.correspondence import distillation
from d2f_core.correspondence.config import MatcherConfig, StudentConfig
from d2f_core.correspondence.convolution_teacher import ConvolutionTeacher
from d2f_core.correspondence.diffusion_teacher import read_block
from d2f_core.correspondence.distillation import all_pairs
from d2f_core.correspondence.embed.config import TeacherConfig
from d2f_core.correspondence.matching import Grid, similarity
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.student import add_adapters, cut, patch_size, tokens
from d2f_core.correspondence.task import distillation_loss, loss_of
from d2f_core.model import footprint
from d2f_core.model.architectures import read_architecture
from d2f_core.model.base import described_copy

DINOV2 = {
    "dinov2-s": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "dinov2-b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "dinov2-l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "dinov2-g": {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True},
}
"""Shapes of DINOv2 with registers, patch 14, trained at 518 pixels. Source: Darcet et al., 2023, arXiv:2309.16588."""


@dataclass(frozen=True, kw_only=True)
class TeacherCount:
    """What a teacher makes of one image."""

    grid: Grid
    channels: int
    flops: float
    """Of one image, all levels of noise together."""

    @property
    def feature_bytes(self) -> int:
        """Of one image's features in float16."""
        return 2 * self.grid[0] * self.grid[1] * self.channels


def described(config: StudentConfig) -> nn.Module:
    """A vision transformer on "meta", cut to its blocks: of a known architecture, or of a directory's config.json."""
    from transformers import AutoConfig, AutoModel, Dinov2WithRegistersConfig

    if config.base in DINOV2:
        shape: dict[str, Any] = {**DINOV2[config.base], "image_size": 518, "patch_size": 14, "num_register_tokens": 4}
        described: Any = Dinov2WithRegistersConfig(**shape)
    else:
        described = AutoConfig.from_pretrained(described_copy(config.base).path, local_files_only=True)
    with torch.device("meta"):
        return cut(AutoModel.from_config(described).requires_grad_(False), config)


def student_on_meta(config: MatcherConfig) -> nn.Module:
    """The student with its adapters, without weights."""
    return add_adapters(described(config.student), config.student, seed=0)


def student_pass(student: nn.Module, *, batch: int, size: int, dtype: torch.dtype) -> footprint.PassCount:
    """One pass of a micro-batch through the student, forward and backward; without the losses."""
    patch = patch_size(student)
    with FakeTensorMode():
        footprint.materialize(student, dtype)
        pixels = torch.zeros(batch, 3, size, size, dtype=dtype)
        return footprint.measure(student.train(), lambda: tokens(student, pixels, patch)[0].float())


@dataclass(frozen=True, kw_only=True)
class LossCount:
    """What the distillation loss of a micro-batch adds to a pass, teachers' features included."""

    peak_bytes: int
    flops: float


def loss_pass(
    config: MatcherConfig, teachers: list[TeacherCount], *, channels: int, grid: Grid, images: int
) -> LossCount:
    """The loss of all pairs of so many images, with the teachers' distributions, forward and backward."""
    pairs = all_pairs(images)

    def run() -> Tensor:
        features = [(torch.empty(images, t.grid[0] * t.grid[1], t.channels).half(), t.grid) for t in teachers]
        student = torch.empty(images, grid[0] * grid[1], channels, requires_grad=True)
        return distillation_loss(student, grid, features, pairs, [1.0] * len(teachers), config.distillation)

    return _counted(run)


def given_pairs_pass(config: MatcherConfig, *, channels: int, grid: Grid, pairs: int) -> LossCount:
    """The loss of so many given pairs, whose distributions are stored with them, forward and backward."""
    measure, tokens_ = loss_of(config.distillation, grid), grid[0] * grid[1]

    def run() -> Tensor:
        student = torch.empty(2 * pairs, tokens_, channels, requires_grad=True)
        losses = []
        for row in range(pairs):
            ways = torch.empty(1, tokens_, tokens_), torch.empty(1, tokens_, tokens_)
            cosines = similarity(student[row : row + 1], student[pairs + row : pairs + row + 1])
            losses.append(distillation.weighted_pair_loss(cosines, *ways, measure, (None, None)))
        return torch.cat(losses)

    return _counted(run)


def _counted(run: Callable[[], Tensor]) -> LossCount:
    """What a loss costs, counted on tensors without contents; those that it begins with are among its bytes."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = footprint.measure(nn.Identity(), run)
    return LossCount(peak_bytes=found.peak_bytes, flops=found.flops)


def count_teacher(config: TeacherConfig) -> TeacherCount:
    """What one image costs a teacher."""
    if config.kind == "diffusion":
        return _diffusion(config)
    if config.kind == "efficientnet-lite0":
        made = ConvolutionTeacher(
            config.name, Preparation(size=config.size, normalisation=config.normalisation), blocks=config.blocks
        )
        flops = footprint.forward_flops(made._network, lambda net: net(torch.zeros(1, 3, config.size, config.size)))
        return TeacherCount(grid=made.grid, channels=made.channels, flops=flops)
    network = described(StudentConfig(base=config.uri, layers=config.layers))
    side = config.size // patch_size(network)
    flops = footprint.forward_flops(network, lambda net: net(pixel_values=torch.zeros(1, 3, config.size, config.size)))
    return TeacherCount(grid=(side, side), channels=int(network.config.hidden_size), flops=flops)  # type: ignore


def _diffusion(config: TeacherConfig) -> TeacherCount:
    """The autoencoder once, the network up to the block at each level of noise; the text, one prompt, not at all."""
    architecture = read_architecture(config.uri)
    with torch.device("meta"):
        unet, vae = architecture.build_unet(), architecture.build_vae()
    unet.register_to_config(addition_embed_type=None)
    side = config.size // architecture.pixels_per_latent
    times = len(config.timesteps)
    shape: list[tuple[int, ...]] = []

    def run(network: Any) -> None:
        latents = torch.zeros(times, network.config.in_channels, side, side)
        text = torch.zeros(times, footprint.TOKENS, network.config.cross_attention_dim)
        found = read_block(network, config.block, latents, torch.zeros(times), encoder_hidden_states=text)
        shape.append(tuple(found.shape))

    flops = footprint.forward_flops(unet, run) + footprint.encode_flops(vae, config.size)
    ((_, channels, height, width),) = shape
    return TeacherCount(grid=(height, width), channels=channels, flops=flops)
