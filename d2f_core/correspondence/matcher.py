"""A matcher: features of images, how images are prepared for them, and how a point is read from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from d2f_core.correspondence.matching import Decoding, Grid, Size, match_points
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.student import StudentError, patch_size, tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedded:
    """What is kept of an image to match its points."""

    features: Tensor
    """[tokens, channels]"""
    size: Size
    """Width and height of the image in pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Matcher:
    name: str
    preparation: Preparation
    grid: Grid
    features: Callable[[Sequence[np.ndarray]], Tensor]
    """Function from uint8 images [h, w, 3] of any sizes to features [images, tokens, channels]."""
    decoding: Decoding = field(default_factory=Decoding)

    def embed(self, images: Sequence[np.ndarray]) -> list[Embedded]:
        """The features of images, uint8 [h, w, 3] each, in half precision."""
        found = self.features(images).half()
        return [
            Embedded(features=each, size=(image.shape[1], image.shape[0]))
            for each, image in zip(found, images, strict=True)
        ]

    def match(self, source: Embedded, target: Embedded, points: Tensor) -> tuple[Tensor, Tensor]:
        """Where points [points, 2] of the source lie in the target; both in pixels of the original images.

        Returns:
            Positions [points, 2], and the cosine [points] of each with what was asked for.
        """
        (frame, corner), (other, other_corner) = map(self.preparation.frame, (source.size, target.size))
        found, cosine = match_points(
            source.features.float(), target.features.float(), points.float() + points.new_tensor(corner).float(),
            grids=(self.grid, self.grid), sizes=(frame, other), decoding=self.decoding,
        )  # fmt: skip
        return found - found.new_tensor(other_corner), cosine


def transformer_matcher(
    name: str, network: nn.Module, preparation: Preparation, decoding: Decoding | None = None
) -> Matcher:
    """The matcher of a vision transformer, such as a student with or without its adapters merged.

    Raises:
        StudentError: it has no patches, or they do not divide the input.
    """
    patch = patch_size(network, name)
    if preparation.size % patch:
        raise StudentError(
            f"size={preparation.size} of {name!r} is no multiple of its patch of {patch} pixels. "
            f"Use {preparation.size // patch * patch}."
        )

    @torch.inference_mode()
    def features(images: Sequence[np.ndarray]) -> Tensor:
        like = next(network.parameters())
        pixels = preparation.pixels(images).to(device=like.device, dtype=like.dtype)
        return tokens(network, pixels, patch)[0].float().cpu()

    side = preparation.size // patch
    return Matcher(
        name=name, preparation=preparation, grid=(side, side), features=features, decoding=decoding or Decoding()
    )
