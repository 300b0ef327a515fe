"""Configs of a distillation. Imports neither torch nor a model, so that a command's help is quick."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

LossName = Literal["cross_entropy", "kl", "soft_argmax", "gaussian_cross_entropy", "reference_double_softmax"]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Which vision transformer is adapted, and where."""

    base: str
    """Its directory in transformers' layout, or an s3:// prefix."""
    layers: int = 0
    """Blocks that are computed, from the first; the final norm follows the last of them. 0: all."""
    rank: int = 8
    alpha: float = 8.0
    """The adapters add `alpha / rank * B A` to the weights."""
    dropout: float = 0.05
    first_block: int = 0
    """Blocks before it are not adapted."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1 or min(self.layers, self.first_block) < 0:
            raise ValueError(
                f"{self} must have rank >= 1, alpha > 0, dropout in [0, 1), layers and first_block >= 0. Mend that one."
            )


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How the student's matches are compared with the teachers'."""

    weight: float = 1.0
    """Of this loss in the sum; 0: it is not computed."""
    loss: LossName = "cross_entropy"
    temperature: float = 0.05
    """Of the student's match distribution."""
    teacher_temperature: float = 0.01
    """Of the teachers'. The published code has one temperature for both."""
    finer: int = 2
    """The teachers' distribution is made on a grid so many times as fine, and summed to the student's."""
    cycle: bool = True
    """Whether a token counts by the probability that the teachers find it again on the way back."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of the teachers in their fusion, by their names; empty: equal."""

    def __post_init__(self) -> None:
        check_weight("distillation.weight", self.weight)
        for name in ("temperature", "teacher_temperature"):
            check_temperature(f"distillation.{name}", getattr(self, name))
        if self.finer < 1:
            raise ValueError(f"distillation.finer={self.finer} must be at least 1. Use 1 or 2.")
        if self.loss == "reference_double_softmax" and self.cycle:
            raise ValueError(
                "distillation.loss='reference_double_softmax' gives a number per target token, and cycle weighs source "
                "tokens. Give --no-distillation.cycle with it."
            )
        if any(not share > 0 for share in self.shares.values()):
            raise ValueError(
                f"distillation.shares={self.shares} must each be above 0. Embed without that teacher instead."
            )


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """How the teachers' matches of a pair are made, and what is stored of them."""

    teacher_temperature: float = 0.01
    """Of the teachers' match distribution."""
    finer: int = 2
    """The distribution is made on a grid so many times as fine, and summed to the student's."""
    cycle: bool = True
    """Whether the probability is stored that a token is found again on the way back, by which it counts."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of the teachers in their fusion, by their names; empty: equal."""
    kept: int = 32
    """Target tokens of each source token that are stored, the most probable; the probability of all others is dropped,
    and how much that is, is stored too."""
    probabilities: Literal["float16", "float32"] = "float16"
    """How the kept ones are stored."""

    def __post_init__(self) -> None:
        check_temperature("targets.teacher_temperature", self.teacher_temperature)
        for name in ("finer", "kept"):
            if getattr(self, name) < 1:
                raise ValueError(f"targets.{name}={getattr(self, name)} must be at least 1.")
        if any(not share > 0 for share in self.shares.values()):
            raise ValueError(f"targets.shares={self.shares} must each be above 0. Embed without that teacher instead.")


@dataclass(frozen=True, kw_only=True)
class MultiViewConfig:
    """How the student's matches are compared with the true ones between views of one thing."""

    weight: float = 0.0
    """Of this loss in the sum; 0: it is not computed."""
    temperature: float = 0.05
    points: int = 64
    """Most points of a pair of views."""
    least_points: int = 8
    """Views that share fewer are no pair."""

    def __post_init__(self) -> None:
        check_weight("multi_view.weight", self.weight)
        check_temperature("multi_view.temperature", self.temperature)
        if not 1 <= self.least_points <= self.points:
            raise ValueError(
                f"multi_view.points={self.points} must be at least multi_view.least_points={self.least_points}, and "
                "that at least 1. Use 64 and 8."
            )


@dataclass(frozen=True, kw_only=True)
class MatcherConfig:
    """What is trained, from what, with which losses."""

    student: StudentConfig
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    multi_view: MultiViewConfig = field(default_factory=MultiViewConfig)

    def __post_init__(self) -> None:
        if not self.distillation.weight + self.multi_view.weight > 0:
            raise ValueError("distillation.weight and multi_view.weight are both 0. Give one of them, such as 1.")


def check_weight(name: str, value: float) -> None:
    """Raises ValueError unless it is a finite number from 0 on."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} must be a number from 0 on. Use 0 to leave it out.")


def check_temperature(name: str, value: float) -> None:
    """Raises ValueError unless it is a finite number above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be above 0. Use 0.01 to 0.1.")
