"""The rules of the promotion gate. Imports no numpy."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from d2f_core.identity import since

NAMED = re.compile(r"(?P<metric>[A-Za-z][\w.@-]*)@(?P<evaluations>[1-9][0-9]*)")
"""Metric and number of evaluations, split at the last @, because a metric's own name may contain one (pck@0.1)."""
FLOW_LOSS = "flow_loss"
PER_MODEL = (FLOW_LOSS, "straightness")
"""Metrics with one value per model, independent of the number of evaluations: named without a number, and stored under
0."""


LEAST_P = 0.001
"""Smallest p-value that the test for memorised images can tell."""


class GateError(ValueError):
    """The gate's rules cannot be applied; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """An absolute bound on a metric, independent of the champion's value."""

    metric: str
    """Metric as NAME@EVALUATIONS, e.g. frechet@4."""
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        parse_metric(self.metric)
        for bound in (self.at_most, self.at_least):
            if bound is not None and math.isnan(bound):
                raise GateError(f"the limit on {self.metric} is no number. Correct it.")
        if self.at_most is None and self.at_least is None:
            raise GateError(f"the limit on {self.metric} has neither at_most nor at_least. Give one of them.")


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """When a candidate passes: it is better by the deciding metric, fails on no prompt, and is nowhere else worse than
    tolerated. Every comparison is paired over the prompts that both models made.
    """

    metric: str = "frechet@4"
    """Deciding metric as NAME@EVALUATIONS, with the names frechet, kernel, precision, recall and clip_score; or,
    without a number, straightness or flow_loss."""
    max_ratio: float = 1.0
    """Largest ratio of candidate to champion (of champion to candidate if more is better); 0.95 requires 5 % better."""
    must_not_regress: tuple[str, ...] = (FLOW_LOSS,)
    """Further metrics that may not get worse by more than `tolerance`. flow_loss, measured on the reference's images,
    refuses a model that only memorised its training images."""
    tolerance: float = 0.05
    """Largest regression of `must_not_regress` metrics, as a share of the champion's value."""
    confident: bool = True
    """Ask it of the end of the paired difference's confidence interval; false: of the value alone, by which every
    second of two equal models passes."""
    confidence: float = since(0.99, before=0.99)
    """One-sided confidence of each comparison: of equal models, the share 1 - confidence passes."""
    detect: float = since(0.1, before=0.1)
    """Difference, as a share of the champion's value, for which the evaluation says how many prompts it takes to see
    it in nine of ten evaluations."""
    most_failed: float = since(0.0, before=0.0)
    """Largest share of prompts without an image of the candidate, at each number of evaluations. Always a rule."""
    memorised: float = since(0.01, before=0.01)
    """The candidate is refused when more of its images lie nearest to a training image than chance explains, with a
    p-value below this. Applied where the training's images are given."""
    limits: tuple[Limit, ...] = ()
    """Absolute bounds on metrics."""
    without_champion: Literal["beat_base", "limits"] = "beat_base"
    """How a candidate without a champion is judged: against the base model, or only by `limits`."""

    def __post_init__(self) -> None:
        for name in (self.metric, *self.must_not_regress):
            parse_metric(name)
        for name in ("max_ratio", "tolerance", "detect"):
            if not math.isfinite(value := getattr(self, name)):
                raise GateError(f"{name}={value} must be a number.")
        if self.max_ratio <= 0:
            raise GateError(f"max_ratio={self.max_ratio} must be above 0. 1 asks for better.")
        if self.tolerance < 0:
            raise GateError(f"tolerance={self.tolerance} must be at least 0.")
        if not 0.5 < self.confidence < 1:
            raise GateError(f"confidence={self.confidence} must lie between 0.5 and 1. 0.99 is usual.")
        if self.detect <= 0:
            raise GateError(f"detect={self.detect} must be above 0. 0.1 is a tenth of the champion's value.")
        for name in ("most_failed", "memorised"):
            if not 0 <= (share := getattr(self, name)) < 1:
                raise GateError(f"{name}={share} must lie from 0 to below 1.")
        if 0 < self.memorised < LEAST_P:
            raise GateError(f"memorised={self.memorised} is less than can be told. Use {LEAST_P} or more, or 0: off.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics that the rules read."""
        return (self.metric, *self.must_not_regress, *(limit.metric for limit in self.limits))


def parse_metric(name: str) -> tuple[str, int]:
    """Split `frechet@4` into name and number; the number of `flow_loss` is 0. Raises GateError for any other form."""
    if name in PER_MODEL:
        return name, 0
    found = NAMED.fullmatch(name)
    if found is None or found["metric"] in PER_MODEL:
        raise GateError(
            f"{name!r} is not NAME@EVALUATIONS, such as frechet@4, nor one of {', '.join(PER_MODEL)}. Correct it."
        )
    return found["metric"], int(found["evaluations"])
