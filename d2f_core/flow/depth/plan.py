"""The plan of a depth job, made before it starts; it depends only on config, source and model.

The source is cut into shards (runs of files or rows, or one tar). A shard is done when its index part exists, so a job
that was killed resumes with the missing ones, and the size of the cluster does not affect any map.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

from d2f_core.batch.output import PLAN_NAME
from d2f_core.data.image_rules import ImageRules
from d2f_core.data.sources.listing import SourcePlan
from d2f_core.flow.depth.config import PredictDepthConfig, PredictDepthError
from d2f_core.flow.depth.predictor import DepthSettings, fill_settings
from d2f_core.identity import identity_values, since
from d2f_core.model.artifact import DescribedModel
from d2f_core.model.base import BaseModelError
from d2f_core.model.config import TimeGrid
from d2f_core.objective.solver import ADAPTIVE
from d2f_core.storage import join, read_bytes

Crop = Literal["whole", "square"]


@dataclass(frozen=True, kw_only=True)
class DepthPlan:
    """Everything that determines the maps; stored beside them as plan.json."""

    source_digest: str
    num_shards: int
    model_uri: str
    """URI of the model, with aliases resolved to a version."""
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
    crop: Literal["whole", "square"] = since("square", before="square")
    time_grid: TimeGrid = since("uniform", before="uniform")

    def rules(self, multiple: int) -> ImageRules:
        """Which images are accepted, and how they are resized.

        Args:
            multiple: pixels that both sides of a whole image are multiples of: the autoencoder's downsampling. The
                UNet takes latents of any size.
        """
        return image_rules(self.crop, self.resolution, self.min_side, self.max_pixels, multiple)

    @property
    def settings(self) -> list[DepthSettings]:
        """The settings for each number of steps."""
        names = ("solver", "shift", "time_grid", "ensemble", "seed")
        common = {name: getattr(self, name) for name in names}
        return [DepthSettings(steps=steps, **common) for steps in self.steps]

    def identity(self) -> dict[str, Any]:
        """The values that must be equal for two jobs to make the same maps; includes the model's hash, not its URI."""
        values = {name: value for name, value in identity_values(self).items() if name != "model_uri"}
        return {"task": "image_to_depth", **values}


def image_rules(crop: Crop, resolution: int, min_side: int, max_pixels: int, multiple: int) -> ImageRules:
    limits: dict[str, Any] = {"resolution": resolution, "min_side": min_side, "max_pixels": max_pixels}
    return ImageRules(**limits) if crop == "square" else ImageRules(**limits, fit="whole", multiple=multiple)


def chosen_crop(config: PredictDepthConfig) -> Crop:
    """As the config says; otherwise as the output was begun, where plans that do not say are of squares; otherwise
    whole."""
    if config.crop:
        return config.crop
    try:
        return json.loads(read_bytes(join(config.output, PLAN_NAME))).get("crop", "square")
    except FileNotFoundError:
        return "whole"


def make_depth_plan(config: PredictDepthConfig, source: SourcePlan, model: DescribedModel, model_uri: str) -> DepthPlan:
    """Make the plan, with the model's defaults for unset fields.

    Raises:
        ValueError: the solver is unknown, or the resolution is not a multiple of the autoencoder's downsampling.
    """
    resolution = max(model.default_size) if config.resolution is None else config.resolution
    crop = chosen_crop(config)
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
        min_side=config.min_side or (resolution if crop == "square" else 1),
        max_pixels=config.max_pixels,
        batch_size=config.batch_size,
        rows_per_part=config.rows_per_part,
        crop=crop,
        time_grid=filled[0].time_grid,
    )
