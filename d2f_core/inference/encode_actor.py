"""The actor of an encode job: it holds the autoencoder, and the text encoder when text states are stored."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from d2f_core.data.latents import arrays_to_table, table_to_arrays
from d2f_core.data.schema import latent_schema
from d2f_core.inference.encode_chunks import pack, unpack
from d2f_core.inference.encode_config import EncodeJob
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import resolve_base
from d2f_core.model.text_encoder import load_text_encoder


class ChunkEncoder:
    """Ray Data actor: pixels of a chunk -> its latent table. Loads the weights once."""

    def __init__(self, job: EncodeJob) -> None:
        torch.set_num_threads(job.config.cpus_per_actor)
        self._job = job
        self._device = "cuda" if job.config.gpus_per_actor else "cpu"
        base = resolve_base(job.config.base)
        self._autoencoder = load_autoencoder(base, device=self._device)
        states = job.config.text == "states"
        self._text_encoder = load_text_encoder(base, device=self._device) if states else None

    def __call__(self, row: pa.Table) -> pa.Table:
        record, meta, buffer = unpack(row)
        if self._autoencoder.fingerprint != self._job.fingerprint["autoencoder"]:
            problem = f"{self._job.config.base!r} is another model on some node. Give a URI that all nodes share."
            return pack(record, meta, problem=problem)
        resolution, size = self._job.config.resolution, self._job.config.batch_size
        pixels = np.frombuffer(buffer, np.uint8).reshape(meta.num_rows, resolution, resolution, 3)
        moments = [self._encode(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        columns: dict[str, Any] = table_to_arrays(meta)
        empty = np.empty((0, *self._job.latent_shape), np.float16)
        columns["latent_mean"] = np.concatenate([empty, *(mean for mean, _ in moments)])
        columns["latent_std"] = np.concatenate([empty, *(std for _, std in moments)])
        text_shape = None
        if self._text_encoder is not None:
            columns["text_state"], text_shape = self._encode_text(list(columns["caption"]), size)
        schema = latent_schema(self._job.latent_shape, text_shape=text_shape)
        return pack(record, arrays_to_table(columns, schema), problem=_not_finite(columns))

    def _encode(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, std = self._autoencoder.encode(to_input(pixels, self._device))
        return mean.half().cpu().numpy(), std.half().cpu().numpy()

    def _encode_text(self, captions: list[str], size: int) -> tuple[np.ndarray, tuple[int, ...]]:
        assert self._text_encoder is not None
        # An empty chunk still needs the shape of its column.
        batches = [captions[start : start + size] for start in range(0, len(captions), size)] or [[""]]
        states = np.concatenate([self._text_encoder.encode(batch).half().cpu().numpy() for batch in batches])
        return states[: len(captions)], states.shape[1:]


def _not_finite(columns: Mapping[str, Any]) -> str | None:
    finite = [np.isfinite(columns[name]).all(axis=(1, 2, 3)) for name in ("latent_mean", "latent_std")]
    wrong = np.flatnonzero(~(finite[0] & finite[1]))
    if not len(wrong):
        return None
    names = ", ".join(columns["sample_id"][row] for row in wrong[:8])
    return (
        f"{len(wrong)} latents are not finite in half precision, of the samples {names}. The autoencoder's weights or "
        "its scaling_factor are damaged; check the base model."
    )


def to_input(pixels: np.ndarray, device: str) -> Tensor:
    """Float32 [batch, 3, height, width] in [-1, 1] of uint8 [batch, height, width, 3]."""
    return torch.tensor(pixels, device=device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
