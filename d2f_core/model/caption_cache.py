"""Encoded captions of a training: each distinct one is encoded once, and kept while there is room."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

ENCODED_TOGETHER = 16
"""Captions per pass of the text encoder, always: a pass of another size may round otherwise, and which captions are new
in a batch depends on where a run was resumed."""
CACHED_BYTES = 4 * 2**30
"""Bytes of encoded captions that are kept, on the worker's device: 18 thousand captions of SD 1.5, 7 thousand of
SDXL."""


class CaptionEncoder(Protocol):
    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What captions give, [len(captions), ...] by the denoiser's argument names."""
        ...


class CaptionCache:
    """Captions -> their conditions, from the encoder or from an earlier call."""

    def __init__(self, encoder: CaptionEncoder, limit: int = CACHED_BYTES) -> None:
        """`limit`: bytes of encoded captions that are kept."""
        self._encoder, self._limit = encoder, limit
        self._kept: dict[str, dict[str, Tensor]] = {}
        self.held_bytes = 0
        """Bytes of the memory that the kept captions hold, which is never above the limit."""

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the captions give, [len(captions), ...] by the denoiser's argument names."""
        new = sorted(set(captions) - self._kept.keys())
        if self.held_bytes + len(new) * self._bytes_each() > self._limit:
            self.clear()
            new = sorted(set(captions))
        encoded: dict[str, dict[str, Tensor]] = {}
        for start in range(0, len(new), ENCODED_TOGETHER):
            encoded |= self._encode(new[start : start + ENCODED_TOGETHER])
        chosen = [encoded.get(caption) or self._kept[caption] for caption in captions]
        for caption in new:
            self._keep(caption, encoded[caption])
        return {name: torch.stack([each[name] for each in chosen]) for name in chosen[0]}

    def clear(self) -> None:
        self._kept.clear()
        self.held_bytes = 0

    def _bytes_each(self) -> int:
        return self.held_bytes // len(self._kept) if self._kept else 0

    def _encode(self, captions: list[str]) -> dict[str, dict[str, Tensor]]:
        """One pass, filled up with empty captions."""
        found = self._encoder.condition(captions + [""] * (ENCODED_TOGETHER - len(captions)))
        # Cloned row by row: a row that is a view holds the memory of the whole pass, and an inference tensor may not
        # take part in autograd.
        return {
            caption: {name: value[index].clone() for name, value in found.items()}
            for index, caption in enumerate(captions)
        }

    def _keep(self, caption: str, condition: dict[str, Tensor]) -> None:
        size = sum(value.untyped_storage().nbytes() for value in condition.values())
        if self.held_bytes + size <= self._limit:
            self._kept[caption] = condition
            self.held_bytes += size
