"""Config of an estimate, and the known GPUs. Imports no torch."""

from dataclasses import dataclass, field

from d2f_core.model.config import ModelConfig
from d2f_core.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Gpu:
    memory: int
    """GPU memory in bytes."""
    tflops: float
    """Peak of dense bf16, in TFLOP/s, by the vendor's data sheet."""


GPUS = {
    "a10g": Gpu(memory=24 * 10**9, tflops=70),
    "l40s": Gpu(memory=48 * 10**9, tflops=362),
    "a100-40": Gpu(memory=40 * 10**9, tflops=312),
    "a100": Gpu(memory=80 * 10**9, tflops=312),
    "h100": Gpu(memory=80 * 10**9, tflops=989),
}


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
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
    gpu: str = "a100"
    """GPU: one of a10g, l40s, a100-40, a100, h100."""
    tflops: float = 0.0
    """Peak of the GPU in TFLOP/s, in place of the preset's; required for fp32, for which there are no presets."""
    utilization: float = 0.35
    """Assumed share of the GPU's peak that a training reaches."""

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(f"gpu={self.gpu!r} is not known. Use one of {', '.join(GPUS)}, and --tflops for another.")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization={self.utilization} must lie above 0 and at most at 1. Use 0.2 to 0.5.")
        if self.rows < 1 or self.captions < 0 or self.tflops < 0:
            raise ValueError(
                f"rows={self.rows} must be at least 1, captions={self.captions} and tflops={self.tflops} at least 0."
            )
