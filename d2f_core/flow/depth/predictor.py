"""Predicts depth from images with one loaded model; shared by the batch job, MLflow's loader and the benchmark.

A map depends only on the model, the image and the settings: the noise of member `k` is keyed by (seed + k, sample_id);
other images in the batch change it by float rounding at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2f_core.flow.depth.config import PredictDepthError
from d2f_core.flow.depth.ensemble import combine
from d2f_core.model.artifact import DescribedModel, TrainedModel
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.config import TimeGrid
from d2f_core.model.sampling import SamplerChoice, check_solver, sample_latents
from d2f_core.model.text_encoder import load_text_encoder
from d2f_core.objective.solver import NonFiniteStateError
from d2f_core.randomness import keyed_normal


@dataclass(frozen=True, kw_only=True)
class DepthSettings:
    """Sampling settings of a map; without text there is no guidance."""

    solver: str
    steps: int
    shift: float
    time_grid: TimeGrid
    ensemble: int
    """Number of members, each sampled from its own noise."""
    seed: int
    """Seed of the first member's noise."""

    def __post_init__(self) -> None:
        SamplerChoice(solver=self.solver, steps=self.steps, guidance=1.0, shift=self.shift, time_grid=self.time_grid)
        if self.ensemble < 1:
            raise PredictDepthError(f"ensemble={self.ensemble} must be at least 1. 4 is usual.")


@dataclass(frozen=True, kw_only=True)
class DepthMade:
    """Result for one image: a map, or the error."""

    depth: np.ndarray | None
    """float32 [height, width] in [0, 1], 0 near."""
    uncertainty: np.ndarray | None
    """float32 [height, width], the members' spread in the same unit."""
    num_evaluations: int
    """Network evaluations of each member."""
    error: str | None


def check_depth_model(model: DescribedModel, uri: str) -> None:
    """Raise PredictDepthError for a model of another task."""
    if model.task != "image_to_depth":
        raise PredictDepthError(
            f"{uri!r} is a model of task={model.task!r}: it reads no image. Give one trained with --model.task "
            "image_to_depth, or draw with pipelines.generate."
        )


def fill_settings(
    model: DescribedModel,
    *,
    solver: str | None = None,
    steps: int | None = None,
    shift: float | None = None,
    ensemble: int = 4,
    seed: int = 0,
) -> DepthSettings:
    """Settings with the model's defaults in place of None; raises ValueError if the solver does not fit the model."""
    carried = model.sampling
    check_solver(model, solver or carried.solver)
    return DepthSettings(
        solver=solver or carried.solver,
        steps=carried.steps if steps is None else steps,
        shift=carried.shift if shift is None else shift,
        time_grid=carried.time_grid,
        ensemble=ensemble,
        seed=seed,
    )


class DepthPredictor:
    """A depth model with its autoencoder and the text states of the empty caption.

    Raises:
        PredictDepthError: the model was trained for another task.
    """

    def __init__(self, model: TrainedModel, *, uri: str = "model", device: str | torch.device = "cpu") -> None:
        check_depth_model(model, uri)
        self.model, self.device = model.to(device), device
        self._autoencoder = load_autoencoder(model.base, device=device)
        self._null = {
            name: value.clone() for name, value in load_text_encoder(model.base, device=device).condition([""]).items()
        }

    def predict(self, pixels: np.ndarray, names: Sequence[str], settings: DepthSettings) -> list[DepthMade]:
        """Predict one batch of images; if the network fails on the batch, each image is predicted by itself.

        Args:
            pixels: uint8 [images, height, width, 3]; height and width are multiples of the autoencoder's downsampling.
            names: the images' sample ids, which key their noise.
        """
        try:
            members, evaluations = self._members(pixels, names, settings)
        except NonFiniteStateError as error:
            if len(names) > 1:
                alone = ((pixels[row : row + 1], names[row : row + 1]) for row in range(len(names)))
                return [made for image, name in alone for made in self.predict(image, name, settings)]
            return [DepthMade(depth=None, uncertainty=None, num_evaluations=0, error=str(error))]
        return [_made(maps, evaluations) for maps in members.swapaxes(0, 1)]

    @torch.inference_mode()
    def _members(self, pixels: np.ndarray, names: Sequence[str], settings: DepthSettings) -> tuple[np.ndarray, int]:
        """Maps [members, images, height, width] in [0, 1], and the network evaluations of each."""
        shape = self.model.base.latent_shape(*pixels.shape[1:3])
        images = torch.tensor(pixels, device=self.device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        condition = self._condition(self._autoencoder.encode(images)[0])
        maps, evaluations = [], 0
        for member in range(settings.ensemble):
            noise = torch.from_numpy(keyed_normal(settings.seed + member, names, shape)).to(self.device)
            latents, evaluations = sample_latents(
                self.model,
                noise,
                condition,
                condition,
                solver=settings.solver,
                steps=settings.steps,
                guidance=1.0,
                shift=settings.shift,
                time_grid=settings.time_grid,
            )
            # Checked on the latents, because decoding would clamp an infinite value to a valid depth.
            usable = latents.flatten(1).isfinite().all(1)
            depth = (self._autoencoder.decode(latents).mean(1) + 1) / 2
            depth[~usable] = torch.nan
            maps.append(depth.float().cpu().numpy())
        return np.stack(maps), evaluations

    def _condition(self, joined: Tensor) -> dict[str, Tensor]:
        null = {name: value.expand(len(joined), *value.shape[1:]) for name, value in self._null.items()}
        return {**null, "joined_latents": joined}


def _made(maps: np.ndarray, evaluations: int) -> DepthMade:
    if not np.isfinite(maps).all():
        return DepthMade(depth=None, uncertainty=None, num_evaluations=evaluations, error="the depth is not finite")
    depth, uncertainty = combine(maps)
    return DepthMade(depth=depth, uncertainty=uncertainty, num_evaluations=evaluations, error=None)
