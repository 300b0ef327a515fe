"""Teachers: frozen networks whose features tell which places of two images are the same; and their fusion.

A teacher has a name, a grid, and features of images. What it gives depends on the image, its key and its caption alone:
not on the other images of a batch, nor on the order in which they come.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from d2f_core.correspondence.config import StudentConfig
from d2f_core.correspondence.matching import Grid, as_map, enlarge, unit
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.student import all_tokens, load_network, patch_size, patch_tokens

CLASS_TOKENS = ("cls_token", "class_embedding")
"""What transformers calls the parameter."""


class TeacherError(ValueError):
    """A teacher cannot be used as it is asked for; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image to be looked at."""

    pixels: np.ndarray
    """uint8 [h, w, 3]."""
    key: str = ""
    """Names the image in the noise that a diffusion teacher adds."""
    category: str = ""
    caption: str = ""


class Teacher(Protocol):
    """What `embed_images` asks for."""

    name: str
    grid: Grid
    channels: int

    def features(self, pictures: Sequence[Picture]) -> Tensor:
        """Features [pictures, tokens, channels] in float32, on the CPU; not normalised."""
        ...


class TransformerTeacher:
    """The normed patch tokens of a vision transformer's block."""

    def __init__(
        self, name: str, uri: str, preparation: Preparation, *, layers: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        """Load it.

        Args:
            uri: a directory in transformers' layout, or an s3:// prefix.
            layers: the block that is read, counted from 1; 0 reads the last.

        Raises:
            StudentError, VisionModelError: it is no vision transformer, or lacks weights.
            TeacherError: the preparation's size is no multiple of its patch.
        """
        self.name, self._preparation, self._device = name, preparation, device
        self._network = load_network(StudentConfig(base=uri, layers=layers), device).eval().requires_grad_(False)
        self._patch = patch_size(self._network, uri)
        if preparation.size % self._patch:
            raise TeacherError(
                f"size={preparation.size} of {name!r} is no multiple of its patch of {self._patch} pixels. "
                f"Use {preparation.size // self._patch * self._patch}."
            )
        side = preparation.size // self._patch
        self.grid: Grid = (side, side)
        self.channels = int(cast(Any, self._network).config.hidden_size)

    @property
    def has_class_token(self) -> bool:
        return any(name.endswith(CLASS_TOKENS) for name, _ in self._network.named_parameters())

    def features(self, pictures: Sequence[Picture]) -> Tensor:
        return self.with_class_tokens(pictures)[0]

    @torch.inference_mode()
    def with_class_tokens(self, pictures: Sequence[Picture]) -> tuple[Tensor, Tensor]:
        """Features, and the token [pictures, channels] that comes before those of patches: the class token of a network
        that `has_class_token`.
        """
        pixels = self._preparation.pixels([picture.pixels for picture in pictures]).to(self._device)
        found = all_tokens(self._network, pixels).float().cpu()
        return patch_tokens(found, self.grid), found[:, 0]


def mean_token(features: Tensor) -> Tensor:
    """An embedding [images, channels] of each image: the mean of its tokens [images, tokens, channels], each brought to
    length 1.
    """
    return unit(features).mean(dim=1)


def resample(features: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Features [images, tokens, channels] of a grid on another grid over the same image, bilinear."""
    return features if grid == to else enlarge(features, grid, to)


def fuse(features: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Features of several teachers on one grid, [images, tokens, channels], side by side and of length 1.

    Each is brought to length 1 first, so that the cosine of the result is the teachers' cosines, weighted by their
    shares: neither the size of a teacher's numbers nor its count of channels counts.

    Args:
        shares: of the teachers, above 0; they are divided by their sum.
    """
    if len(features) != len(shares) or not all(share > 0 for share in shares):
        raise TeacherError(f"shares={list(shares)} for {len(features)} teachers: give one above 0 for each.")
    parts = [(share / sum(shares)) ** 0.5 * unit(each) for share, each in zip(shares, features, strict=True)]
    return torch.cat(parts, dim=-1)


def fuse_by_rows(features: Sequence[Tensor], grid: Grid) -> Tensor:
    """The fusion of the published code of arXiv:2412.03512, for comparison only.

    It divides each channel by its length along the rows of the grid, not each token by its length over the channels; so
    a teacher's share is its count of channels, and a channel's numbers depend on what else stands in the row.
    """
    maps = [as_map(each.float(), grid) for each in features]
    rows = torch.cat([each / each.norm(dim=-1, keepdim=True).clamp(min=1e-12) for each in maps], dim=1)
    return unit(rows.flatten(2).transpose(1, 2))
