"""The actor of an embedding job: holds the teachers."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from d2f_core.batch.chunks import TableActor
from d2f_core.batch.table_spec import TableJobError
from d2f_core.correspondence.embed.config import TeacherConfig
from d2f_core.correspondence.embed.spec import EmbedSpec
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.teachers import Picture, Teacher
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
            columns[name] = self._features(name, teacher, pictures)
        return arrays_to_table(columns, self._spec.schema())

    def _features(self, name: str, teacher: Teacher, pictures: list[Picture]) -> np.ndarray:
        """float16 [images, tokens, channels]."""
        found = np.empty((len(pictures), *self._spec.shapes[name]), np.float16)
        size = self._spec.config.batch_size
        for start in range(0, len(pictures), size):
            found[start : start + size] = teacher.features(pictures[start : start + size]).numpy()
        if not np.isfinite(found).all():
            raise TableJobError(f"{name} are not finite in half precision. Check the teacher's weights and its dtype.")
        return found


def build_teacher(config: TeacherConfig, device: str | torch.device) -> Teacher:
    """The teacher of a config, with its weights.

    Raises:
        ValueError: it cannot be what is asked for; see the teachers' classes.
    """
    preparation = Preparation(size=config.size, normalisation=config.normalisation)
    if config.kind == "transformer":
        from d2f_core.correspondence.teachers import TransformerTeacher

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
