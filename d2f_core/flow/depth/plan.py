"""What a depth job will make, decided before it starts: a function of config, source and model alone.

The source is cut into shards (runs of files or rows, or one tar). A shard is done when its index part exists, so a job
that was killed goes on with the missing ones, and the size of the cluster changes nothing in any map.
"""

from dataclasses import dataclass, field
from typing import Any

from d2f_core.data.image_rules import MAX_PIXELS_LIMIT, ImageRules
from d2f_core.data.sources.config import ImageSource
from d2f_core.data.sources.listing import SourcePlan
from d2f_core.flow.depth.predictor import DepthSettings, PredictDepthError, fill_settings
from d2f_core.identity import identity_values
from d2f_core.model.artifact import TrainedModel
from d2f_core.model.base import BaseModelError
from d2f_core.objective.solver import ADAPTIVE


@dataclass(frozen=True, kw_only=True)
class PredictDepthConfig:
    source: ImageSource = field(default_factory=ImageSource)
    """Images; captions are not read. A depth table is one too."""
    model: str = ""
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the directory of a trained depth model (s3:// or local)."""
    output: str = ""
    """Where depth/ and index/ are written, and manifest.json at the end."""
    solver: str | None = None
    """euler, heun, midpoint, rk4, dopri5, ... or ddim; None: what the model carries."""
    steps: tuple[int, ...] = ()
    """Every image is sampled once for each, from the same noises; empty: what the model carries."""
    shift: float | None = None
    """Above 1, steps are spent nearer to noise; None: what the model carries."""
    ensemble: int = 4
    """Maps per image, from seeds `seed`, `seed` + 1, ...; their median is the result, their spread the uncertainty."""
    seed: int = 0
    resolution: int | None = None
    """Edge in pixels of the square that every image is cropped and resized to; None: what the model carries."""
    min_side: int | None = None
    """Smallest accepted short side in pixels; None: the resolution, so that no image is enlarged."""
    max_pixels: int = 50_000_000
    """Largest accepted width x height of an image file."""
    batch_size: int = 16
    """Images per forward pass."""
    rows_per_part: int = 64
    """Images per unit of work: what a killed actor loses at most. A tar is always one unit."""
    num_actors: int = 2
    cpus_per_actor: int = 1
    """Logical CPUs that Ray reserves per actor, and torch threads of a CPU actor."""
    gpus_per_actor: float = 0
    node_wait_seconds: int = 60
    """How long a cluster without room is given to get it; an autoscaler is asked for all actors at once."""
    experiment: str = "diff2flow-depth"
    """MLflow experiment that gets a run of this job, where MLFLOW_TRACKING_URI is set; empty: none."""

    def __post_init__(self) -> None:
        for name in ("ensemble", "batch_size", "rows_per_part", "num_actors", "cpus_per_actor"):
            if getattr(self, name) < 1:
                raise PredictDepthError(f"{name}={getattr(self, name)} must be at least 1.")
        if len(set(self.steps)) != len(self.steps) or any(steps < 1 for steps in self.steps):
            raise PredictDepthError(f"steps={self.steps} must be different numbers of at least 1.")
        if not 1 <= self.max_pixels <= MAX_PIXELS_LIMIT:
            raise PredictDepthError(f"max_pixels={self.max_pixels} must be between 1 and {MAX_PIXELS_LIMIT}.")
        if self.min_side is not None and self.min_side < 1:
            raise PredictDepthError(f"min_side={self.min_side} must be at least 1 pixel, or None for the resolution.")

    def check_complete(self) -> None:
        """Raises PredictDepthError when a URI is missing, or the output lies inside the source."""
        for name, value in (("source.uri", self.source.uri), ("model", self.model), ("output", self.output)):
            if not value:
                raise PredictDepthError(f"{name} is empty. Give --{name} URI.")
        if f"{self.output.rstrip('/')}/".startswith(f"{self.source.uri.rstrip('/')}/"):
            raise PredictDepthError(f"output={self.output!r} lies inside the source. Put it beside it.")


@dataclass(frozen=True, kw_only=True)
class DepthPlan:
    """Everything that decides the maps; kept beside them as plan.json."""

    source_digest: str
    num_shards: int
    model_uri: str
    """Pinned: never an alias."""
    model_hash: str
    steps: tuple[int, ...]
    solver: str
    shift: float
    ensemble: int
    seed: int
    resolution: int
    min_side: int
    max_pixels: int
    batch_size: int
    rows_per_part: int

    @property
    def rules(self) -> ImageRules:
        return ImageRules(resolution=self.resolution, min_side=self.min_side, max_pixels=self.max_pixels)

    @property
    def settings(self) -> list[DepthSettings]:
        """One for each number of steps."""
        common = {"solver": self.solver, "shift": self.shift, "ensemble": self.ensemble, "seed": self.seed}
        return [DepthSettings(steps=steps, **common) for steps in self.steps]

    def identity(self) -> dict[str, Any]:
        """What must be equal for two jobs to make the same maps: of the model its hash, not its place."""
        values = {name: value for name, value in identity_values(self).items() if name != "model_uri"}
        return {"task": "image_to_depth", **values}


def make_depth_plan(config: PredictDepthConfig, source: SourcePlan, model: TrainedModel, model_uri: str) -> DepthPlan:
    """Fill in what the config leaves to the model.

    Raises:
        ValueError: an unknown solver, or a resolution that the autoencoder does not divide.
    """
    resolution = max(model.default_size) if config.resolution is None else config.resolution
    try:
        model.base.latent_shape(resolution, resolution)
    except BaseModelError as error:
        raise PredictDepthError(f"resolution={resolution}: {error}") from None
    filled = [
        fill_settings(
            model, solver=config.solver, steps=steps, shift=config.shift, ensemble=config.ensemble, seed=config.seed
        )
        for steps in config.steps or (model.sampling.steps,)
    ]
    if filled[0].solver in ADAPTIVE and len(filled) > 1:
        raise PredictDepthError(
            f"solver={filled[0].solver!r} chooses its steps by itself: steps={config.steps} would be the same map "
            "several times. Give --steps 1."
        )
    return DepthPlan(
        source_digest=source.digest,
        num_shards=len(source.shards),
        model_uri=model_uri,
        model_hash=model.content_hash,
        steps=tuple(settings.steps for settings in filled),
        solver=filled[0].solver,
        shift=filled[0].shift,
        ensemble=config.ensemble,
        seed=config.seed,
        resolution=resolution,
        min_side=resolution if config.min_side is None else config.min_side,
        max_pixels=config.max_pixels,
        batch_size=config.batch_size,
        rows_per_part=config.rows_per_part,
    )
