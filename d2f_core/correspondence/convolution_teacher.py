"""A convolutional network as a teacher: EfficientNet-Lite0, which two wheels bring along."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2f_core.correspondence.matching import Grid
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.teachers import Picture, TeacherError, fuse, resample
from d2f_core.model.efficientnet import load_efficientnet_lite0

STRIDE = 16
"""Pixels of the input per token."""


class ConvolutionTeacher:
    """The outputs of some of EfficientNet-Lite0's blocks, each brought to length 1 per token, side by side."""

    def __init__(
        self, name: str, preparation: Preparation, *, blocks: tuple[int, ...] = (10, 14),
        device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        """Load it.

        Args:
            preparation: with the normalisation `efficientnet-lite`.
            blocks: numbers from 0 to 15; later ones know more of what a thing is, and less of where.

        Raises:
            ImportError: a wheel is not installed.
            TeacherError: a block that is not there, or a preparation for another kind of network.
        """
        network, _ = load_efficientnet_lite0(device)
        if not blocks or not all(0 <= block < len(network._blocks) for block in blocks):
            raise TeacherError(
                f"blocks={blocks} of {name!r} must be at least one, from 0 to {len(network._blocks) - 1}."
            )
        if preparation.normalisation != "efficientnet-lite" or preparation.size % STRIDE:
            raise TeacherError(
                f"{name!r} needs normalisation='efficientnet-lite' and a size that is a multiple of {STRIDE}; it has "
                f"{preparation.normalisation!r} and {preparation.size}. Mend that one."
            )
        self.name, self._preparation, self._network, self._device = name, preparation, network, device
        self._blocks = blocks
        side = preparation.size // STRIDE
        self.grid: Grid = (side, side)
        self.channels = sum(_channels(network._blocks[block]) for block in blocks)

    @torch.inference_mode()
    def features(self, pictures: Sequence[Picture]) -> Tensor:
        network = self._network
        pixels = self._preparation.pixels([picture.pixels for picture in pictures]).to(self._device)
        state = network._swish(network._bn0(network._conv_stem(pixels)))
        parts = []
        for number, block in enumerate(network._blocks[: max(self._blocks) + 1]):
            state = block(state)
            if number in self._blocks:
                own = (state.shape[2], state.shape[3])
                parts.append(resample(state.flatten(2).transpose(1, 2), own, self.grid))
        return fuse(parts, [1.0] * len(parts)).cpu()


def _channels(block: Any) -> int:
    return int(block._project_conv.out_channels)
