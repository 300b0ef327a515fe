"""Rules by which checkpoints are kept. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Retention rules; a checkpoint is kept if any of them applies."""

    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: int = 0
    """Number of best checkpoints by `metric` to keep; 0: the rule is off."""
    metric: str = ""
    """Name of the metric in `evaluation.json`."""
    lower_is_better: bool = True
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept forever; 0: the rule is off."""

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"keep_last={self.keep_last} must be at least 1: a run resumes from the last one.")
        for name in ("keep_best", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0. Use 0 to switch this rule off.")
        if self.keep_best and not self.metric:
            raise ValueError(f"keep_best={self.keep_best} needs a metric. Name one that the evaluation writes.")
