"""GPUs that an estimate reckons with. Imports no torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    memory: int
    """GPU memory in bytes."""
    tflops: float
    """Peak of dense bf16, in TFLOP/s, by the vendor's data sheet."""
    utilization: tuple[float, float] = (0.35, 0.35)
    """Assumed share of the peak that a training reaches, at least and at most."""
    dollars: tuple[float, float] | None = None
    """An hour's price at the cheapest and at the dearest place of `PRICES_OF`; None: not looked up."""


GPUS = {
    "a10g": Gpu(memory=24 * 10**9, tflops=70),
    "l40s": Gpu(memory=48 * 10**9, tflops=362),
    "a100-40": Gpu(memory=40 * 10**9, tflops=312, dollars=(1.99, 1.99)),
    "a100": Gpu(memory=80 * 10**9, tflops=312, dollars=(1.39, 2.79)),
    # Not measured here. bigASP v2.5, a full finetuning of SDXL on 32 of them, made 300 samples/s: 17 % of the peak, and
    # 23 % if it computed activations again, as its code does by default.
    "h100": Gpu(memory=80 * 10**9, tflops=989, utilization=(0.20, 0.23), dollars=(2.69, 3.99)),
}
PRICES_OF = "RunPod on 2026-11-09, Lambda on 2026-09-20, on demand"
"""Where and when `Gpu.dollars` were read: RunPod's community and secure clouds, Lambda's machines of eight."""


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """On which GPU an estimate reckons, and how well it is used."""

    gpu: str = "a100"
    """GPU: one of a10g, l40s, a100-40, a100, h100."""
    tflops: float = 0.0
    """Peak of the GPU in TFLOP/s, in place of the preset's; required for fp32, for which there are no presets."""
    utilization: float | None = None
    """Share of the GPU's peak that a training reaches; None: assumed to be 0.35, and on h100 0.2 to 0.23."""
    dollars_per_gpu_hour: float | None = None
    """Price of a GPU for an hour; None: as looked up in 2026 for a100-40, a100 and h100."""

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(f"gpu={self.gpu!r} is not known. Use one of {', '.join(GPUS)}, and --tflops for another.")
        if self.utilization is not None and not 0 < self.utilization <= 1:
            raise ValueError(f"utilization={self.utilization} must lie above 0 and at most at 1. Use 0.2 to 0.5.")
        if self.dollars_per_gpu_hour is not None and not 0 <= self.dollars_per_gpu_hour < math.inf:
            raise ValueError(
                f"dollars_per_gpu_hour={self.dollars_per_gpu_hour} must be a number of at least 0. Use 2.5."
            )
        if self.tflops < 0:
            raise ValueError(f"tflops={self.tflops} must be at least 0. Use 0 for the preset's.")

    @property
    def peak(self) -> float:
        """Peak in TFLOP/s."""
        return self.tflops or GPUS[self.gpu].tflops

    @property
    def shares(self) -> tuple[float, float]:
        """Share of the peak that is reckoned with, at least and at most."""
        return GPUS[self.gpu].utilization if self.utilization is None else (self.utilization, self.utilization)

    def flops_per_hour(self, workers: int) -> float:
        """What so many GPUs compute in an hour at least."""
        return 3600 * workers * self.peak * 1e12 * self.shares[0]

    def assumption(self) -> str:
        """What times are reckoned with, as the beginning of a sentence."""
        share = _range(*self.shares, lambda value: f"{value:.0%}")
        return (
            f"Reckoned with {share} of {self.peak:g} TFLOP/s per GPU (assumed) and nothing lost to exchange or reading:"
        )

    def span(self, most: float, decimals: int = 1) -> str:
        """Hours as text without their unit, from those that the least share takes."""
        low, high = self.shares
        return _range(most * low / high, most, lambda value: f"{value:.{decimals}f}")

    def cost(self, most: float, samples: int) -> str:
        """Samples a second and GPU hours as text, with their price where one is known.

        Args:
            most: GPU hours at the least share.
            samples: that are trained on in them.
        """
        low, high = self.shares
        rate = samples / (3600 * most)
        found = f"{_range(rate, rate * high / low, _rounded)} samples/s per GPU; {self.span(most, 0)} GPU hours"
        given, known = self.dollars_per_gpu_hour, GPUS[self.gpu].dollars
        each = known if given is None else (given, given)
        if each is None:
            return f"{found}. For their price give --dollars-per-gpu-hour."
        price = _range(most * low / high * each[0], most * each[1], lambda value: f"{value:,.0f}")
        source = f" ({PRICES_OF})" if given is None else ""
        return f"{found}, {price} dollars at {_range(*each, lambda value: f'{value:.2f}')} each{source}."


def _rounded(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _range(low: float, high: float, text: Callable[[float], str]) -> str:
    return text(high) if text(low) == text(high) else f"{text(low)} to {text(high)}"
