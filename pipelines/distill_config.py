"""The config of a distillation."""

from dataclasses import dataclass, field
from typing import Literal

from d2f_core.correspondence.config import MatcherConfig
from d2f_core.correspondence.evaluate.config import ViewPairsConfig
from d2f_core.identity import since
from d2f_core.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A student that learns to match like its teachers, and then like views of one thing."""

    matcher: MatcherConfig
    features: str
    """Table of images and their teachers' features, or of pairs and their match targets."""
    output: str
    """Where checkpoints and the resolved config are written; the same output resumes the training."""
    start: str = ""
    """A trained matcher whose adapters the student starts with: its directory, or models:/NAME@ALIAS; empty: from its
    base."""
    bucket: Literal["category", "things", "retrieval"] = "category"
    """What the images of a micro-batch have in common: their category, or also that they show one of a few things, or
    that they look alike (one of `clusters`)."""
    clusters: str = since("", before="")
    """Table of clusters that `mine_pairs` wrote, with bucket='retrieval'."""
    things: int = 2
    """That share a micro-batch, with bucket='things'."""
    normalisation: str = "imagenet"
    """Of the student's input."""
    matching_size: int = 0
    """Height and width in pixels of the input at which the matcher is evaluated, and used later; 0: as in training."""
    pairs: ViewPairsConfig = field(default_factory=ViewPairsConfig)
    """Pairs of views on which the training is evaluated."""
    train: TrainConfig = field(default_factory=TrainConfig)
    experiment: str = "distilldift"
    """MLflow experiment."""
    name: str = "distill"
    """MLflow run name."""

    def __post_init__(self) -> None:
        if self.things < 1:
            raise ValueError(f"things={self.things} must be at least 1. Use 2.")
        if (self.bucket == "retrieval") != bool(self.clusters):
            raise ValueError(f"bucket={self.bucket!r} and clusters={self.clusters!r}: one goes with the other.")

    @property
    def bucket_column(self) -> str:
        """Name of the bucketing, for the run's identity."""
        return f"{self.things} things" if self.bucket == "things" else self.bucket
