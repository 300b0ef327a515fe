"""Config of a distillation's estimate. Imports no torch."""

from dataclasses import dataclass, field

from d2f_core.correspondence.config import MatcherConfig
from d2f_core.correspondence.embed.config import TeacherConfig
from d2f_core.train.config import TrainConfig
from d2f_core.train.gpus import GpuConfig


@dataclass(frozen=True, kw_only=True)
class EstimateDistillConfig(GpuConfig):
    """A student, its teachers and the images. A student's base and a teacher's uri are each a known architecture
    (dinov2-s, dinov2-b, dinov2-l, dinov2-g; sd15, sd21, sdxl), or a directory of which only the configs are read."""

    matcher: MatcherConfig
    """As for `pipelines.distill`."""
    teachers: tuple[TeacherConfig, ...] = ()
    """As for `pipelines.embed_images`."""
    size: int = 434
    """Height and width in pixels of the student's input."""
    images: int = 12_000
    """Images that are embedded."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """As for `pipelines.distill`; the estimate also shows the other ZeRO stages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 1 or self.size < 14:
            raise ValueError(f"images={self.images} must be at least 1, and size={self.size} at least 14.")
