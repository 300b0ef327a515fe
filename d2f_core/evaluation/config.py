"""The rules of the promotion gate. Light: no numpy."""

import re
from dataclasses import dataclass
from typing import Literal

NAMED = re.compile(r"(?P<metric>[A-Za-z][\w.@-]*)@(?P<evaluations>[1-9][0-9]*)")
"""The last @ parts them: a metric's own name may hold one, as pck@0.1 does."""
FLOW_LOSS = "flow_loss"
PER_MODEL = (FLOW_LOSS, "straightness")
"""Metrics with one value per model, whatever the number of evaluations: named without one, and kept under 0."""


class GateError(ValueError):
    """A gate whose rules cannot be applied, with the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """An absolute bound, whatever the champion does."""

    metric: str
    """NAME@EVALUATIONS, e.g. frechet@4."""
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        parse_metric(self.metric)
        if self.at_most is None and self.at_least is None:
            raise GateError(f"the limit on {self.metric} has neither at_most nor at_least. Give one of them.")


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """When a candidate passes: it is better where it must be, and nowhere worse than tolerated."""

    metric: str = "frechet@4"
    """NAME@EVALUATIONS that decides; names: frechet, kernel, precision, recall, clip_score, failed; and by itself
    straightness, or flow_loss, the held-out loss that each model's training measured."""
    max_ratio: float = 1.0
    """Candidate over champion at most; where more is better, champion over candidate. 0.95 asks for 5 % better."""
    must_not_regress: tuple[str, ...] = ()
    """Further ones that may not get worse by more than `tolerance`. flow_loss here refuses a model that only knows its
    training images better; compare trainings that held out the same rows."""
    tolerance: float = 0.05
    """Share of the champion's value by which those may be worse."""
    confident: bool = False
    """The upper end of the paired difference's interval must keep the bound, not the measured value alone."""
    limits: tuple[Limit, ...] = ()
    """Absolute bounds."""
    without_champion: Literal["beat_base", "limits"] = "beat_base"
    """The first candidate: compared to the base model, or by `limits` alone."""

    def __post_init__(self) -> None:
        for name in (self.metric, *self.must_not_regress):
            parse_metric(name)
        if self.max_ratio <= 0:
            raise GateError(f"max_ratio={self.max_ratio} must be above 0. 1 asks for no worse.")
        if self.tolerance < 0:
            raise GateError(f"tolerance={self.tolerance} must be at least 0.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that a rule reads."""
        return (self.metric, *self.must_not_regress, *(limit.metric for limit in self.limits))


def parse_metric(name: str) -> tuple[str, int]:
    """`frechet@4` as its two parts, `flow_loss` with 0. Raises GateError for any other form."""
    if name in PER_MODEL:
        return name, 0
    found = NAMED.fullmatch(name)
    if found is None or found["metric"] in PER_MODEL:
        raise GateError(
            f"{name!r} is not NAME@EVALUATIONS, such as frechet@4, nor one of {', '.join(PER_MODEL)}. Correct it."
        )
    return found["metric"], int(found["evaluations"])
