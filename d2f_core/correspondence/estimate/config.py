"""Config of a distillation's estimate. Imports no torch."""

from dataclasses import dataclass, field

from d2f_core.correspondence.config import MatcherConfig, TargetConfig
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
    pairs: int = 0
    """Rows of a table of given pairs, as `pipelines.embed_pairs` writes it; 0: pairs are made of the images of a
    micro-batch."""
    targets: TargetConfig = field(default_factory=TargetConfig)
    """As for `pipelines.embed_pairs`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """As for `pipelines.distill`; the estimate also shows the other ZeRO stages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 1 or self.size < 14 or self.pairs < 0:
            raise ValueError(
                f"images={self.images} must be at least 1, size={self.size} at least 14, and pairs={self.pairs} at "
                "least 0."
            )

    @property
    def images_per_pass(self) -> int:
        """Images of a micro-batch."""
        return self.train.micro_batch_size * (2 if self.pairs else 1)

    @property
    def pairs_per_pass(self) -> int:
        """Pairs of a micro-batch, each compared in both directions."""
        batch = self.train.micro_batch_size
        return batch if self.pairs else batch * (batch - 1) // 2
