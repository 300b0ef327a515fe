"""The actor of an encode job: holds the autoencoder, and the text encoder if text states are stored."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from d2f_core.batch.chunks import TableActor
from d2f_core.batch.table_spec import TableJobError
from d2f_core.data.arrays import arrays_to_table, table_to_arrays
from d2f_core.data.schema import array_field, array_kind
from d2f_core.device import reserved_device
from d2f_core.flow.encode.spec import EncodeSpec
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import resolve_base
from d2f_core.model.caption_rules import read_rules
from d2f_core.model.text_encoder import load_text_encoder


class LatentEncoder(TableActor):
    """Ray Data actor: a chunk's pictures -> its latent table. Loads the weights once."""

    def __init__(self, spec: EncodeSpec) -> None:
        torch.set_num_threads(spec.config.cpus_per_actor)
        self._spec = spec
        self._device = reserved_device()
        base = resolve_base(spec.config.base).read_captions(read_rules(spec.fingerprint))
        self._autoencoder = load_autoencoder(base, device=self._device)
        states = spec.fingerprint["text"] == "states"
        self._text_encoder = load_text_encoder(base, device=self._device) if states else None

    def make(self, prepared: pa.Table) -> pa.Table:
        if self._autoencoder.fingerprint != self._spec.fingerprint["autoencoder"]:
            raise TableJobError(
                f"{self._spec.config.base!r} is another model on some node. Give a URI that all nodes share."
            )
        columns: dict[str, Any] = table_to_arrays(prepared)
        shape = self._latent_shape(prepared.schema)
        schema = self._spec.kind.schema(shape)
        encoded: list[str] = []
        for picture in self._spec.kind.pictures:
            pixels = columns.pop(picture.name)
            columns[picture.mean], std = self._encode(pixels, shape)
            if picture.std is not None:
                columns[picture.std] = std
            if picture.flipped is not None:
                columns |= zip(picture.flipped, self._encode(np.flip(pixels, 2), shape), strict=True)
            encoded += picture.encoded
        if self._text_encoder is not None:
            columns["text_state"], of_states = self._encode_text(list(columns["caption"]), self._spec.config.batch_size)
            schema = schema.append(array_field("text_state", "float16", of_states))
        _check_finite(columns, encoded)
        return arrays_to_table(columns, schema)

    def _latent_shape(self, prepared: pa.Schema) -> tuple[int, int, int]:
        """Channels, height and width of the latents of prepared pictures, which are all of one size."""
        if not self._spec.kind.pictures:
            return self._spec.latent_shape
        height, width, *_ = array_kind(prepared.field(self._spec.kind.pictures[0].name))[0]
        return self._spec.of_size((width, height)).latent_shape

    def _encode(self, pictures: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the scaled latents of a chunk's pictures, float16 [rows, C, h, w] each."""
        empty = np.empty((0, *shape), np.float16)
        means, stds = [empty], [empty]
        for start in range(0, len(pictures), self._spec.config.batch_size):
            batch = to_input(pictures[start : start + self._spec.config.batch_size], self._device)
            mean, std = self._autoencoder.encode(batch)
            means.append(mean.half().cpu().numpy())
            stds.append(std.half().cpu().numpy())
        return np.concatenate(means), np.concatenate(stds)

    def _encode_text(self, captions: list[str], size: int) -> tuple[np.ndarray, tuple[int, ...]]:
        assert self._text_encoder is not None
        # An empty chunk's column needs its shape too.
        batches = [captions[start : start + size] for start in range(0, len(captions), size)] or [[""]]
        states = np.concatenate([self._text_encoder.encode(batch).half().cpu().numpy() for batch in batches])
        return states[: len(captions)], states.shape[1:]


def _check_finite(columns: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise TableJobError when a latent in these columns is not finite."""
    wrong = np.zeros(len(columns["sample_id"]), bool)
    for name in names:
        wrong |= ~np.isfinite(columns[name]).all(axis=(1, 2, 3))
    if wrong.any():
        samples = ", ".join(columns["sample_id"][row] for row in np.flatnonzero(wrong)[:8])
        raise TableJobError(
            f"{wrong.sum()} latents are not finite in half precision, of the samples {samples}. The autoencoder's "
            "weights or its scaling_factor are damaged; check the base model."
        )


def to_input(pictures: np.ndarray, device: str) -> Tensor:
    """The autoencoder's input, float32 [batch, 3, height, width] in [-1, 1].

    Args:
        pictures: uint8 [batch, height, width, 3], or float32 [batch, height, width] in [-1, 1], which becomes three
            equal channels.
    """
    tensor = torch.tensor(np.ascontiguousarray(pictures), device=device)
    if pictures.dtype == np.uint8:
        return tensor.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return tensor[:, None].expand(-1, 3, -1, -1)
