"""Settings of the flow losses, for configs; imports no torch. Times: Esser et al., 2024, arXiv:2403.03206, 3.1."""

import math
from dataclasses import dataclass
from typing import Literal

NaiveTarget = Literal["noise_minus_data", "data_minus_noise"]
"""What a naively trained flow network puts out. `noise_minus_data`: as rectified-flow models do, and nearly what an
epsilon or v network puts out already. `data_minus_noise`: as the paper's published baseline does."""


@dataclass(frozen=True, kw_only=True)
class TimeSampling:
    """Maps each sample's uniform number to its flow time (`path.draw_times`)."""

    distribution: Literal["uniform", "logit_normal", "mode"] = "uniform"
    """`logit_normal`: more times in the middle of the path. `mode`: more (`scale` > 0) or fewer there (`scale` < 0)."""
    mean: float = 0.0
    """logit_normal: mean of logit(t); above 0 leans towards data."""
    std: float = 1.0
    """logit_normal: standard deviation of logit(t)."""
    scale: float = 1.29
    """mode: strength of the weighting, between -1 and 2 / (pi - 2) = 1.75."""
    shift: float = 1.0
    """Shift towards noise that is applied afterwards (`shift_times`); 1: none."""

    def __post_init__(self) -> None:
        if self.distribution not in ("uniform", "logit_normal", "mode"):
            raise ValueError(f"time distribution {self.distribution!r} is not known: uniform, logit_normal or mode.")
        if not (0 < self.std < math.inf and 0 < self.shift < math.inf and math.isfinite(self.mean)):
            given = f"mean={self.mean}, std={self.std} and shift={self.shift} of the flow times"
            raise ValueError(f"{given} must be finite, the last two above 0. Use 0, 1 and 1.")
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"mode scale={self.scale} must lie in [-1, 1.75]: beyond, times would run backward.")
