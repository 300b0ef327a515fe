"""Configs of depth prediction and its evaluation. Imports neither torch nor a model."""

import math
from dataclasses import dataclass, field
from typing import Literal

from d2f_core.batch.config import AwaitedPoolConfig
from d2f_core.data.image_rules import MAX_PIXELS_LIMIT
from d2f_core.data.sources.config import ImageSource, lies_in
from d2f_core.evaluation.config import parse_metric
from d2f_core.identity import since

FLOORS = ("constant", "vertical ramp", "mean depth")
"""Baseline predictions that do not depend on the image; made by `errors.floor_maps`."""


class PredictDepthError(ValueError):
    """Depth cannot be predicted as asked; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class PredictDepthWork:
    """Which images depth is predicted for, how, and in which units of work."""

    source: ImageSource = field(default_factory=ImageSource)
    """Images, without captions; a depth table also works."""
    model: str = ""
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the directory of a trained depth model (s3:// or local)."""
    output: str = ""
    """Where depth/ and index/ are written, and manifest.json at the end."""
    solver: str | None = None
    """euler, heun, midpoint, rk4, dopri5, ... or ddim; None: the model's default."""
    steps: tuple[int, ...] = ()
    """Numbers of solver steps; every image is sampled once with each, from the same noise. Empty: the model's
    default."""
    shift: float | None = None
    """Flow-time shift: above 1, more steps are near noise; None: the model's default."""
    ensemble: int = 4
    """Maps per image, from seeds `seed`, `seed` + 1, ...; their median is the result, their spread the uncertainty."""
    seed: int = 0
    crop: Literal["whole", "square"] | None = since(None, before=None)
    """whole: every image keeps its aspect, as published evaluations of depth do. square: its centre square alone. None:
    whole; where the output was begun before whole images were known, square, so that it can be completed."""
    resolution: int | None = None
    """Long side in pixels that every image is resized to (of a square, both sides); None: the model's default."""
    min_side: int | None = None
    """Smallest accepted short side in pixels; None: of squares the resolution, so that none is enlarged; of whole
    images any, for published evaluations enlarge small images too."""
    max_pixels: int = 50_000_000
    """Largest accepted width x height of an image file."""
    batch_size: int = 16
    """Images per forward pass."""
    rows_per_part: int = 64
    """Images per unit of work, the most that is lost when an actor is killed. A tar is always one unit."""


@dataclass(frozen=True, kw_only=True)
class PredictDepthConfig(AwaitedPoolConfig, PredictDepthWork):
    experiment: str = "diff2flow-depth"
    """MLflow experiment for this job's run, if MLFLOW_TRACKING_URI is set; empty: no run."""

    def __post_init__(self) -> None:
        self.check_counts("ensemble", "batch_size", "rows_per_part", error=PredictDepthError)
        if len(set(self.steps)) != len(self.steps) or any(steps < 1 for steps in self.steps):
            raise PredictDepthError(f"steps={self.steps} must be different numbers of at least 1.")
        if not 1 <= self.max_pixels <= MAX_PIXELS_LIMIT:
            raise PredictDepthError(f"max_pixels={self.max_pixels} must be between 1 and {MAX_PIXELS_LIMIT}.")
        if self.min_side is not None and self.min_side < 1:
            raise PredictDepthError(f"min_side={self.min_side} must be at least 1 pixel, or None for the resolution.")

    def check_complete(self) -> None:
        """Raise PredictDepthError when a URI is missing, or the output lies inside the source."""
        for name, value in (("source.uri", self.source.uri), ("model", self.model), ("output", self.output)):
            if not value:
                raise PredictDepthError(f"{name} is empty. Give --{name} URI.")
        if lies_in(self.output, self.source.uri):
            raise PredictDepthError(f"output={self.output!r} lies inside the source. Put it beside it.")


class DepthEvaluationError(ValueError):
    """A depth evaluation cannot run as asked; the message gives the reason and the fix."""


Alignment = Literal["scale_shift", "scale", "median", "none"]
Mask = Literal["none", "garg", "eigen", "nyu_eigen"]


@dataclass(frozen=True, kw_only=True)
class DepthGateConfig:
    """When a depth model becomes the champion; every rule is paired over images."""

    candidate: str = ""
    """Title or model URI of the predictions that are judged; empty: none are. They must beat every floor."""
    metric: str = "abs_rel@4"
    """Deciding metric as NAME@EVALUATIONS: abs_rel, sq_rel, rmse, rmse_log, log10, silog, delta1, delta2 or delta3."""
    champion: str = "auto"
    """Title of the predictions that must be beaten as the champion's; auto: those by the version that the champion's
    alias names, if there is one; empty: none."""
    must_beat: tuple[str, ...] = ()
    """Titles of further predictions that must be beaten."""
    tolerance: float = 0.0
    """By which share of the champion's value the candidate may be worse; 0: it must be better."""
    least_images: int = 50
    """Fewer images judge nobody: their intervals are too narrow."""
    most_failed: int = 0
    """Images of the truth for which the candidate may have no map. Both of a comparison are measured on the images that
    both have a map of, so that an image on which a model fails would otherwise cost it nothing."""
    confident: bool = True
    """Ask it of the worse end of the paired difference's interval, not only of the value."""
    confidence: float = since(0.99, before=0.99)
    """One-sided confidence of each comparison: of equal models, the share 1 - confidence passes."""
    detect: float = since(0.1, before=0.1)
    """Difference, as a share of the other's value, for which the verdict says how many images it takes to see it in
    nine of ten evaluations."""
    unequal_settings: bool = since(False, before=False)
    """Judge a candidate whose predictions were made with other settings (steps, solver, ensemble, resolution, ...) than
    the champion's or those of `must_beat`; otherwise it does not pass."""
    promote: bool = True
    """Move the champion's alias to a candidate that passes, when it is a registered version."""
    champion_alias: str = "champion"

    def __post_init__(self) -> None:
        parse_metric(self.metric)
        if not 0.5 < self.confidence < 1:
            raise DepthEvaluationError(f"gate.confidence={self.confidence} must lie between 0.5 and 1. Use 0.99.")
        if self.detect <= 0:
            raise DepthEvaluationError(f"gate.detect={self.detect} must be above 0. 0.1 is a tenth of the other's.")
        if not 0 <= self.tolerance < 1:
            raise DepthEvaluationError(f"gate.tolerance={self.tolerance} must lie from 0 to below 1. Use 0.")
        if self.least_images < 1 or self.most_failed < 0:
            raise DepthEvaluationError(
                f"gate.least_images={self.least_images} must be at least 1, and gate.most_failed={self.most_failed} at "
                "least 0. Use 50 and 0."
            )
        if not self.champion_alias:
            raise DepthEvaluationError("gate.champion_alias is empty. Use 'champion'.")


@dataclass(frozen=True, kw_only=True)
class EvaluateDepthWork:
    """Which predictions are compared with which truth, and how."""

    predictions: tuple[str, ...] = ()
    """Outputs of predict_depth for the images of `truth`."""
    titles: tuple[str, ...] = ()
    """One title per output, for the figures; empty: the outputs' models."""
    truth: str = ""
    """Depth table with the ground truth."""
    train: str = ""
    """Depth table that the models were trained on, whose mean map is a baseline; empty: the mean of `truth`, a baseline
    that has seen the test data."""
    output: str = ""
    """Where the JSON file, the pictures and the errors of each image are written. The same command goes on with what is
    missing of the errors."""
    alignment: Alignment = since("scale_shift", before="scale_shift")
    """How each map is fitted to its truth, on the pixels that count: by scale and shift or by a scale alone (least
    squares), by the ratio of the medians, or not at all, for maps in metres."""
    min_depth: float = since(1e-3, before=1e-3)
    """Metres: truth counts above it, and fitted maps are raised to it."""
    max_depth: float | None = since(None, before=None)
    """Metres: truth counts below it, and fitted maps are lowered to it. Usual: 10 for NYU, 80 for KITTI; None: no
    cap."""
    mask: Mask = since("none", before="none")
    """Part of the truth that counts: all; KITTI's by Garg or by Eigen; NYU's by Eigen, of 480 x 640 pixels."""
    replicates: int = 200
    """Bootstrap replicates per confidence interval."""
    shown: int = 6
    """Number of images on the sheet, from the first one on."""
    rows_per_part: int = since(64, before=64)
    """Images per unit of work, the most that is lost when an actor is killed."""
    gate: DepthGateConfig = since(DepthGateConfig(), before=DepthGateConfig())
    experiment: str = "diff2flow-evaluate"
    """MLflow experiment; empty: no run."""


@dataclass(frozen=True, kw_only=True)
class EvaluateDepthConfig(AwaitedPoolConfig, EvaluateDepthWork):
    # These came later than evaluations were stored.
    num_actors: int = since(2, before=2)
    cpus_per_actor: int = since(1, before=1)
    gpus_per_actor: float = since(0.0, before=0.0)
    node_wait_seconds: int = since(60, before=60)

    def __post_init__(self) -> None:
        if self.titles and len(set(self.titles)) != len(self.predictions):
            raise DepthEvaluationError(f"titles={self.titles} must be different, one for each of the predictions.")
        if set(self.titles) & set(FLOORS):
            raise DepthEvaluationError(f"titles={self.titles} must not be those of floors: {', '.join(FLOORS)}.")
        if self.replicates < 20 or self.shown < 1:
            raise DepthEvaluationError(
                f"replicates={self.replicates} must be at least 20, and shown={self.shown} at least 1."
            )
        self.check_counts("rows_per_part", error=DepthEvaluationError)
        if not 0 < self.min_depth < (self.max_depth or math.inf):
            raise DepthEvaluationError(
                f"min_depth={self.min_depth} must lie above 0 and below max_depth={self.max_depth}, both in metres. "
                "Use 0.001, and 80 for KITTI or 10 for NYU."
            )
