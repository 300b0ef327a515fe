"""From a chosen matcher to one that matches."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2f_core import storage
from d2f_core.correspondence.artifact import DESCRIPTION, describe_matcher, load_student
from d2f_core.correspondence.config import StudentConfig
from d2f_core.correspondence.embed.actor import build_teacher
from d2f_core.correspondence.embed.check import describe_teacher
from d2f_core.correspondence.evaluate.config import EvaluateMatchesError, MatcherChoice
from d2f_core.correspondence.matcher import Matcher, transformer_matcher
from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.student import load_network, merge, patch_size
from d2f_core.correspondence.teachers import Picture, Teacher, fuse, resample
from d2f_core.model.base import described_copy
from d2f_core.tracking import resolve_model


class SharedTeacher:
    """A teacher of several matchers, which are asked about the same images one after another: its last answers are
    kept."""

    KEPT = 4
    """Answers: a batch with the source and one with the target, and their mirror images."""

    def __init__(self, teacher: Teacher) -> None:
        self.name, self.grid, self.channels = teacher.name, teacher.grid, teacher.channels
        self._teacher = teacher
        self._answers: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()

    def features(self, pictures: Sequence[Picture]) -> Tensor:
        asked = tuple(picture.key for picture in pictures)
        if asked not in self._answers:
            self._answers[asked] = self._teacher.features(pictures)
        if len(self._answers) > self.KEPT:
            self._answers.popitem(last=False)
        return self._answers[asked]


def build_matchers(choices: Sequence[MatcherChoice], device: str | torch.device = "cpu") -> list[Matcher]:
    """The matchers, each teacher built once; raises as `build_matcher`."""
    configs = dict.fromkeys(teacher for choice in choices for teacher in choice.teachers)
    shared = {config: SharedTeacher(build_teacher(config, device)) for config in configs}
    return [
        _of_teachers(choice, [shared[teacher] for teacher in choice.teachers])
        if choice.teachers
        else build_matcher(choice, device)
        for choice in choices
    ]


def build_matcher(choice: MatcherChoice, device: str | torch.device = "cpu") -> Matcher:
    """The matcher, with its weights.

    Raises:
        ValueError: it cannot be what is asked for.
    """
    if choice.teachers:
        return _of_teachers(choice, [build_teacher(teacher, device) for teacher in choice.teachers])
    uri = resolve_model(choice.uri)
    if is_trained(uri):
        student, description = load_student(uri, device)
        own = description.preparation
        size = choice.size or own.size
        preparation = Preparation(size=size, normalisation=own.normalisation, fit=own.fit)
        return transformer_matcher(choice.name, merge(student), preparation, description.decoding)
    _check_size(choice)
    network = load_network(StudentConfig(base=uri, layers=choice.layers), device).to(device).eval()
    return transformer_matcher(choice.name, network, Preparation(size=choice.size, normalisation=choice.normalisation))


def is_trained(uri: str) -> bool:
    """Whether a trained matcher is there, and no bare network."""
    return storage.file_exists(storage.join(uri, DESCRIPTION))


def describe_choice(choice: MatcherChoice) -> dict[str, Any]:
    """What determines the matcher's answers, as JSON values; no weights are loaded.

    Raises:
        ValueError: it cannot be what is asked for.
    """
    if choice.teachers:
        weights = {teacher.name: describe_teacher(teacher)[1] for teacher in choice.teachers}
        teachers = [{**asdict(teacher), "uri": weights[teacher.name]} for teacher in choice.teachers]
        return {"teachers": teachers, "shares": choice.shares or (1.0,) * len(teachers)}
    uri = resolve_model(choice.uri)
    weights = described_copy(uri).hash()
    if is_trained(uri):
        own = describe_matcher(uri)
        return {"weights": weights, "base": own.base_hash, "size": choice.size or own.preparation.size}
    _check_size(choice)
    patch_size(load_network(StudentConfig(base=uri, layers=choice.layers), "meta"), choice.uri)
    return {"weights": weights, **{name: getattr(choice, name) for name in ("size", "layers", "normalisation")}}


def _check_size(choice: MatcherChoice) -> None:
    if not choice.size:
        raise EvaluateMatchesError(f"matcher {choice.name!r} is no trained one: give its size in pixels, such as 434.")


def _of_teachers(choice: MatcherChoice, teachers: Sequence[Teacher]) -> Matcher:
    return fused_matcher(choice.name, teachers, choice.shares or (1.0,) * len(teachers))


def fused_matcher(name: str, teachers: Sequence[Teacher], shares: Sequence[float]) -> Matcher:
    """The matcher of teachers together, on the finest of their grids; each prepares images in its own way."""
    grid = max((teacher.grid for teacher in teachers), key=lambda grid: grid[0] * grid[1])

    def features(images: Sequence[np.ndarray]) -> Tensor:
        pictures = [Picture(pixels=image, key=hashlib.sha256(image.tobytes()).hexdigest()) for image in images]
        parts = [resample(teacher.features(pictures), teacher.grid, grid) for teacher in teachers]
        return fuse(parts, shares)

    return Matcher(name=name, preparation=Preparation(size=224, fit="stretch"), grid=grid, features=features)
