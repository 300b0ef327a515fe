"""Latents from noise, by a flow solver or by the base model's own DDIM."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from d2f_core.model.artifact import TrainedModel
from d2f_core.objective.guidance import guided
from d2f_core.objective.solver import SOLVERS, integrate, uniform_times

DDIM = "ddim"


@dataclass(frozen=True, kw_only=True)
class SamplerChoice:
    """How to sample: every field of it is written beside the images."""

    solver: str
    steps: int
    guidance: float
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.solver not in (*SOLVERS, DDIM):
            raise ValueError(f"solver={self.solver!r} is not known. Use one of {', '.join((*SOLVERS, DDIM))}.")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1.")
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift} must be above 0. 1 keeps the steps equal.")


@torch.inference_mode()
def sample_latents(
    model: TrainedModel,
    noise: Tensor,
    text_states: Tensor,
    null_states: Tensor,
    *,
    solver: str,
    steps: int,
    guidance: float,
    shift: float = 1.0,
) -> tuple[Tensor, int]:
    """Latents from noise [batch, C, h, w].

    Args:
        text_states: [batch, tokens, width].
        null_states: the empty caption's states, same shape; not used at guidance 1.

    Returns:
        Latents, and the number of network evaluations per image (a guided pair counts once).

    Raises:
        ValueError: a choice that makes no sense.
        NonFiniteStateError: the network failed on a sample, which is named.
    """
    SamplerChoice(solver=solver, steps=steps, guidance=guidance, shift=shift)
    if solver == DDIM:
        return _ddim(model, noise, text_states, null_states, steps, guidance)
    field = guided(model.velocity_field, guidance, {"text_states": text_states}, {"text_states": null_states})
    return integrate(field, noise, uniform_times(steps, shift).to(noise.device), solver)


def _ddim(
    model: TrainedModel, noise: Tensor, text_states: Tensor, null_states: Tensor, steps: int, guidance: float
) -> tuple[Tensor, int]:
    scheduler = cast(Any, DDIMScheduler).from_config(
        dict(model.base.scheduler_config), timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(steps)
    x = noise
    for timestep in scheduler.timesteps:
        batch = timestep.expand(len(x)).float().to(x.device)

        def predict(x_dm: Tensor, timesteps: Tensor, **condition: Tensor) -> Tensor:
            return model.denoiser(x_dm, timesteps, **condition)

        prediction = guided(predict, guidance, {"text_states": text_states}, {"text_states": null_states})(x, batch)
        x = scheduler.step(prediction, int(timestep), x).prev_sample
    return x, steps
