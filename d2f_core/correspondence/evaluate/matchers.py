"""From a chosen matcher to one that matches."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from d2f_core import storage
from d2f_core.correspondence.artifact import DESCRIPTION, load_student
from d2f_core.correspondence.config import StudentConfig
from d2f_core.correspondence.embed.actor import build_teacher
from d2f_core.correspondence.evaluate.config import EvaluateMatchesError, MatcherChoice
from d2f_core.correspondence.matcher import Matcher, transformer_matcher
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.student import load_network, merge
from d2f_core.correspondence.teachers import Picture, Teacher, fuse, resample
from d2f_core.tracking import resolve_model


def build_matcher(choice: MatcherChoice, device: str | torch.device = "cpu") -> Matcher:
    """The matcher, with its weights.

    Raises:
        ValueError: it cannot be what is asked for.
    """
    if choice.teachers:
        teachers = [build_teacher(teacher, device) for teacher in choice.teachers]
        return fused_matcher(choice.name, teachers, choice.shares or (1.0,) * len(teachers))
    uri = resolve_model(choice.uri)
    if storage.file_exists(storage.join(uri, DESCRIPTION)):
        student, description = load_student(uri, device)
        own = description.preparation
        size = choice.size or own.size
        preparation = Preparation(size=size, normalisation=own.normalisation, fit=own.fit)
        return transformer_matcher(choice.name, merge(student), preparation, description.decoding)
    if not choice.size:
        raise EvaluateMatchesError(f"matcher {choice.name!r} is no trained one: give its size in pixels, such as 434.")
    network = load_network(StudentConfig(base=uri, layers=choice.layers), device).to(device).eval()
    return transformer_matcher(choice.name, network, Preparation(size=choice.size, normalisation=choice.normalisation))


def fused_matcher(name: str, teachers: Sequence[Teacher], shares: Sequence[float]) -> Matcher:
    """The matcher of teachers together, on the finest of their grids; each prepares images in its own way."""
    grid = max((teacher.grid for teacher in teachers), key=lambda grid: grid[0] * grid[1])

    def features(images: Sequence[np.ndarray]) -> Tensor:
        pictures = [Picture(pixels=image, key=hashlib.sha256(image.tobytes()).hexdigest()) for image in images]
        parts = [resample(teacher.features(pictures), teacher.grid, grid) for teacher in teachers]
        return fuse(parts, shares)

    return Matcher(name=name, preparation=Preparation(size=224, fit="stretch"), grid=grid, features=features)
