"""The actor of an embedding job: holds the teachers."""

from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from d2f_core.batch.chunks import TableActor
from d2f_core.batch.table_spec import TableJobError
from d2f_core.correspondence.embed.config import TeacherConfig
from d2f_core.correspondence.embed.spec import EMBEDDING, EmbedSpec
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.teachers import Picture, Teacher, TransformerTeacher, mean_token
from d2f_core.data.arrays import arrays_to_table, table_to_arrays
from d2f_core.data.images import decode_image
from d2f_core.device import reserved_device


class Embedder(TableActor):
    """Ray Data actor: a chunk's images -> their features. Loads the teachers once."""

    def __init__(self, spec: EmbedSpec) -> None:
        torch.set_num_threads(spec.config.cpus_per_actor)
        device = reserved_device()
        self._spec = spec
        self._teachers = {each.column: build_teacher(each, device) for each in spec.config.teachers}
        self._student = Preparation(size=spec.config.size, normalisation="none")

    def make(self, prepared: pa.Table) -> pa.Table:
        columns: dict[str, Any] = table_to_arrays(prepared)
        images = [np.asarray(decode_image(data, self._spec.config.rules)) for data in columns.pop("image")]
        pictures = [
            Picture(pixels=image, key=key, category=category)
            for image, key, category in zip(images, columns["sample_id"], columns["category"], strict=True)
        ]
        side = self._spec.config.size
        columns["pixels"] = np.empty((len(images), side, side, 3), np.uint8)
        for row, image in zip(columns["pixels"], images, strict=True):
            row[:] = (self._student.pixels([image])[0] * 255).round().permute(1, 2, 0).numpy()
        for name, teacher in self._teachers.items():
            columns |= self._seen_by(name, teacher, pictures)
        return arrays_to_table(columns, self._spec.schema())

    def _seen_by(self, name: str, teacher: Teacher, pictures: list[Picture]) -> dict[str, np.ndarray]:
        """A teacher's float16 features [images, tokens, channels], and with those of one the embeddings [images,
        channels].
        """
        count, shape, size = len(pictures), self._spec.shapes[name], self._spec.config.batch_size
        found: dict[str, np.ndarray] = {name: np.empty((count, *shape), np.float16)}
        if name == self._spec.config.embedded_column:
            found[EMBEDDING] = np.empty((count, shape[1]), np.float16)
        for start in range(0, count, size):
            rows = slice(start, start + size)
            for values, made in zip(found.values(), self._look(teacher, pictures[rows], len(found) > 1), strict=True):
                values[rows] = made.numpy()
        for column, values in found.items():
            if not np.isfinite(values).all():
                raise TableJobError(
                    f"{column} of {name!r} are not finite in half precision. Check the teacher's weights and its dtype."
                )
        return found

    def _look(self, teacher: Teacher, pictures: list[Picture], embedded: bool) -> list[Tensor]:
        """Features, and the embeddings where they are asked for, of one forward pass."""
        if embedded and self._spec.config.pooling == "class":
            return list(cast(TransformerTeacher, teacher).with_class_tokens(pictures))
        features = teacher.features(pictures)
        return [features, mean_token(features)] if embedded else [features]


def build_teacher(config: TeacherConfig, device: str | torch.device) -> Teacher:
    """The teacher of a config, with its weights.

    Raises:
        ValueError: it cannot be what is asked for; see the teachers' classes.
    """
    preparation = Preparation(size=config.size, normalisation=config.normalisation)
    if config.kind == "transformer":
        return TransformerTeacher(config.name, config.uri, preparation, layers=config.layers, device=device)
    if config.kind == "efficientnet-lite0":
        from d2f_core.correspondence.convolution_teacher import ConvolutionTeacher

        return ConvolutionTeacher(config.name, preparation, blocks=config.blocks, device=device)
    from d2f_core.correspondence.diffusion_teacher import DiffusionReading, DiffusionTeacher
    from d2f_core.model.base import resolve_base

    reading = DiffusionReading(
        block=config.block,
        timesteps=config.timesteps,
        prompt=config.prompt,
        micro_conditioning=config.micro_conditioning,
        seed=config.seed,
    )
    dtype = getattr(torch, config.dtype)
    return DiffusionTeacher(config.name, resolve_base(config.uri), preparation, reading, device=device, dtype=dtype)
