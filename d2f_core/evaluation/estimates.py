"""Measured values with confidence intervals, by model and number of network evaluations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from d2f_core.evaluation.bootstrap import percentile_interval


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A value, its 95 % interval from a bootstrap over images, and the number of images."""

    value: float
    low: float
    high: float
    count: int
    replicates: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)
    """The value on each resampled set; sets of the same prompts share their draws."""
    exact: bool = False
    """Whether it is counted rather than estimated: no other prompts are meant than these."""

    @classmethod
    def of(cls, value: float, replicates: np.ndarray, count: int) -> "Estimate":
        low, high = percentile_interval(value, replicates)
        return cls(value=value, low=low, high=high, count=count, replicates=replicates)

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric's values for every model and number of network evaluations."""

    name: str
    """Full name, including the feature network and its dimensions; used in MLflow."""
    title: str
    """Title in reports."""
    higher_is_better: bool
    values: Mapping[str, Mapping[int, Estimate]]
    """Values by role (candidate, champion, base), then by number of network evaluations."""
    floor: Estimate | None = None
    """Value that images from the reference's own distribution would have, which is due to sampling noise alone."""
    missing: str = ""
    """Why there are no values."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "higher_is_better": self.higher_is_better,
            "values": {
                role: {str(count): estimate.to_json() for count, estimate in values.items()}
                for role, values in self.values.items()
            },
            "floor": self.floor and self.floor.to_json(),
            **({"missing": self.missing} if self.missing else {}),
        }
