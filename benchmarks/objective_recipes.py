"""The losses that `benchmarks.objectives` compares, by name, and what trains and samples each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.plain_training import PlainTraining
from d2f_core.data.sample_order import SampleOrder
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig
from d2f_core.model.text_to_image import TextToImage
from d2f_core.objective.time_sampling import TimeSampling
from d2f_core.train.config import TrainConfig

Method = Literal["full", "small", "attention"]
Objective = Literal["diff2flow", "diffusion", "naive", "naive_logit_normal", "published"]
"""diff2flow and diffusion; naive flow matching towards noise - data with uniform times, and with logit-normal times
shifted by 2.5, as rectified-flow models of Stable Diffusion are trained; and towards data - noise, as published."""
BATCH = 32
RATES: dict[Method, float] = {"full": 5e-4, "small": 1e-3, "attention": 2e-3}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """How one of the losses is trained and sampled."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Of `ModelConfig`."""
    times: TimeSampling | None = TimeSampling()  # noqa: RUF009  (frozen)
    """Flow times of the training; None: it draws timesteps."""
    solver: str = "euler"


LOSSES: dict[str, Loss] = {
    "diff2flow": Loss(settings={"objective": "diff2flow"}),
    "diffusion": Loss(settings={"objective": "diffusion"}, times=None, solver="ddim-clean"),
    "naive": Loss(settings={"objective": "flow_matching"}),
    "naive_logit_normal": Loss(
        settings={"objective": "flow_matching"}, times=TimeSampling(distribution="logit_normal", shift=2.5)
    ),
    "published": Loss(settings={"objective": "flow_matching", "naive_target": "data_minus_noise"}),
}


def task_for(base: str, objective: str, method: Method, seed: int, times: TimeSampling | None = None) -> TextToImage:
    """The task of a training on the base.

    Args:
        times: in place of the loss's own flow times.
    """
    loss = LOSSES[objective]
    chosen = ModelConfig(
        base=base,
        method="full" if method == "full" else "lora",
        lora=LoraConfig(preset="" if method == "full" else method),
        caption_dropout=0.0,
        times=(times or loss.times) if loss.times else TimeSampling(),
        **loss.settings,
    )
    return TextToImage(resolve_base(base), chosen, seed=seed, dtype=torch.float32, device="cpu")


def training_of(
    task: TextToImage, rows: Any, order: SampleOrder, steps: int, rate: float, state: Path | None = None
) -> PlainTraining:
    return PlainTraining(task, rows, order, TrainConfig(num_steps=steps, learning_rate=rate, warmup_steps=20), state)
