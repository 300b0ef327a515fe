"""GPUs that an estimate reckons with. Imports no torch."""

from dataclasses import dataclass


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
class GpuConfig:
    """On which GPU an estimate reckons, and how well it is used."""

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
        if self.tflops < 0:
            raise ValueError(f"tflops={self.tflops} must be at least 0. Use 0 for the preset's.")

    @property
    def peak(self) -> float:
        """Peak in TFLOP/s."""
        return self.tflops or GPUS[self.gpu].tflops

    def flops_per_hour(self, workers: int) -> float:
        """What so many GPUs compute in an hour."""
        return 3600 * workers * self.peak * 1e12 * self.utilization
