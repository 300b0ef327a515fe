"""Latents from noise, by a flow solver or by diffusers' DDIM and DPM-Solver++ on the base's schedule."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from d2f_core.model.artifact import DescribedModel, TrainedModel
from d2f_core.model.config import TimeGrid
from d2f_core.model.image_sizes import sizes_of_new_images
from d2f_core.objective.guidance import guided
from d2f_core.objective.solver import SOLVERS, TIME_GRIDS, NonFiniteStateError, integrate

DDIM, DDIM_CLEAN = "ddim", "ddim-clean"
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    DDIM: (DDIMScheduler, {"clip_sample": False}),
    DDIM_CLEAN: (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
    "dpm++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
}
"""diffusers' schedulers, with settings that are added to the base's: one network evaluation per step; `dpm++` is of
second order. Where a base says `set_alpha_to_one: false`, as Stable Diffusion does, `ddim` ends at its first trained
level as stock pipelines do and leaves that level's noise in the latents; `ddim-clean` ends without noise."""


@dataclass(frozen=True, kw_only=True)
class SamplerChoice:
    """Sampling settings; all fields are recorded with the images."""

    solver: str
    steps: int
    guidance: float
    shift: float = 1.0
    time_grid: TimeGrid = "uniform"

    def __post_init__(self) -> None:
        if self.solver not in (*SOLVERS, *SCHEDULERS):
            raise ValueError(f"solver={self.solver!r} is not known. Use one of {', '.join((*SOLVERS, *SCHEDULERS))}.")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1.")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift={self.shift} must be a number above 0. 1 keeps the steps equal.")
        if self.time_grid not in TIME_GRIDS:
            raise ValueError(f"time_grid={self.time_grid!r} is not known. Use one of {', '.join(TIME_GRIDS)}.")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance={self.guidance} must be a number. 1 is none.")


def check_solver(model: DescribedModel, solver: str) -> None:
    """Refuse (ValueError) a diffusion sampler for a network that puts out velocities: it would draw noise."""
    if solver in SCHEDULERS and model.puts_out_velocity:
        raise ValueError(
            f"solver={solver!r} reads predictions of a diffusion network, and this one puts out velocities (objective "
            f"{model.objective!r}, {model.base.prediction_type} base). Use {', '.join(SOLVERS)}."
        )


@torch.inference_mode()
def sample_latents(
    model: TrainedModel,
    noise: Tensor,
    condition: Mapping[str, Tensor] | Tensor,
    null: Mapping[str, Tensor] | Tensor,
    *,
    solver: str,
    steps: int,
    guidance: float,
    shift: float = 1.0,
    time_grid: TimeGrid = "uniform",
) -> tuple[Tensor, int]:
    """Latents from noise [batch, C, h, w].

    Args:
        condition: the captions' tensors [batch, ...] by the denoiser's argument names; a single tensor is the text
            states. With `pooled_text` (SDXL), missing image sizes default to those of the images to be made, uncropped.
        null: the same for the empty captions; not used at guidance 1.
        shift, time_grid: the flow times of the steps; not used by diffusers' schedulers and by adaptive solvers.

    Returns:
        Latents, and the number of network evaluations per image (a guided pair counts once).

    Raises:
        ValueError: an unknown solver, one that does not fit the model, or invalid steps, guidance, shift or time
            grid.
        ConditionError: the network needs a condition that is not given, or cannot take one that is.
        NonFiniteStateError: the network's output for a sample is not finite; the message names the sample.
    """
    SamplerChoice(solver=solver, steps=steps, guidance=guidance, shift=shift, time_grid=time_grid)
    check_solver(model, solver)
    condition, null = _named(model, noise, condition), _named(model, noise, null)
    if solver in SCHEDULERS:
        return _by_scheduler(solver, model, noise, condition, null, steps, guidance)
    field = guided(model.velocity_field, guidance, condition, null)
    return integrate(field, noise, TIME_GRIDS[time_grid](steps, shift).to(noise.device), solver)


def _named(model: TrainedModel, noise: Tensor, given: Mapping[str, Tensor] | Tensor) -> dict[str, Tensor]:
    condition = {"text_states": given} if isinstance(given, Tensor) else dict(given)
    if "pooled_text" in condition and "time_ids" not in condition:
        height, width = (side * model.base.pixels_per_latent for side in noise.shape[2:])
        condition["time_ids"] = sizes_of_new_images(len(noise), height, width).to(noise.device)
    return condition


def refuse_non_finite(prediction: Tensor, where: str) -> None:
    """Refuse a prediction [batch, ...] with values that are not finite.

    Raises:
        NonFiniteStateError: names the samples.
    """
    finite = prediction.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        bad = [number for number, good in enumerate(finite.tolist()) if not good]
        raise NonFiniteStateError(
            f"the prediction of samples {bad} is not finite at {where}. Check the weights, or compute in float32 "
            "or bfloat16 instead of float16."
        )


def _by_scheduler(
    solver: str,
    model: TrainedModel,
    noise: Tensor,
    condition: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    steps: int,
    guidance: float,
) -> tuple[Tensor, int]:
    kind, settings = SCHEDULERS[solver]
    scheduler = kind.from_config(dict(model.base.scheduler_config), timestep_spacing="trailing", **settings)
    scheduler.set_timesteps(steps)
    x = noise
    for timestep in scheduler.timesteps:
        batch = timestep.expand(len(x)).float().to(x.device)
        prediction = guided(model.denoiser, guidance, condition, null)(x, batch)
        refuse_non_finite(prediction, f"timestep {timestep}")
        x = scheduler.step(prediction, timestep, x).prev_sample
    return x, steps
