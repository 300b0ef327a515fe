"""Config of an estimate. Imports no torch."""

from dataclasses import dataclass, field

from d2f_core.model.config import ModelConfig
from d2f_core.train.config import TrainConfig
from d2f_core.train.gpus import GpuConfig


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(GpuConfig):
    architecture: str
    """sd15, sd21, sdxl, or a base model's directory (local or s3://), of which only the configs are read."""
    resolution: int = 512
    """Height and width in pixels of the images."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(base=""))
    """Model settings, as for the finetuning."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training settings, as for the finetuning; the estimate also shows the other ZeRO stages."""
    rows: int = 1_000_000
    """Rows of the latent table."""
    captions: int = 0
    """Number of distinct captions; 0: every row has its own."""
    pairs: bool = False
    """Whether rows also contain noise, as for reflow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < 1 or self.captions < 0:
            raise ValueError(f"rows={self.rows} must be at least 1, and captions={self.captions} at least 0.")
