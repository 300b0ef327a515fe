"""What a network predicts, told from its weights: epsilon, v, data, or noise - data.

Files lie. Rectified-flow checkpoints say epsilon in their headers, and directories converted from them say whatever
their converter knew; read wrongly, they train and draw nonsense without an error. So the network is asked about
pictures under known noise, at three levels, and each reading is compared with what it should have been. This happens
where a base's weights are loaded, and what was found is kept by the base's hash.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from d2f_core.hashing import cache_root, one_at_a_time
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import BaseModel, BaseModelError, is_sdxl, schedule_hash
from d2f_core.objective.alignment import align, alpha_sigma
from d2f_core.objective.path import expand, interpolate
from d2f_core.objective.schedule import FLOW_PREDICTION, PREDICTION_TYPES, FlowTimes, NoiseSchedule, Schedule

FLOW_TIMES = (0.2, 0.4, 0.6)
"""Where both ends show in what a network puts out; further out, readings resemble each other."""
LARGEST_SIDE, PIXELS, TOKENS = 32, 2048, 77
VERSION = 1
"""Of the questions asked: what another version found is not read."""
FITS, APART = 0.75, 0.9
"""A reading fits when what it leaves is below `FITS` of what it should explain, and is told from another when it leaves
less than `APART` of what that one leaves. A network of random weights leaves everything, and nothing is told of it."""
logger = logging.getLogger(__name__)

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How well each prediction type explains what a network puts out."""

    left: Mapping[str, float]
    """Prediction type -> share of its target's mean square that the network's answers leave, mean over levels; 0 is
    perfect, 1 is no better than 0 everywhere."""

    @property
    def best(self) -> str:
        return min(self.left, key=lambda kind: self.left[kind])

    def fits(self, prediction_type: str) -> bool:
        """Whether this reading explains the answers, and none explains them clearly better."""
        return self.left[prediction_type] < FITS and not self.contradicts(prediction_type)

    def contradicts(self, prediction_type: str) -> bool:
        """Whether another reading fits, and clearly better than this one."""
        return self.left[self.best] < min(FITS, APART * self.left[prediction_type])


def simple_pictures(count: int, side: int, seed: int = 0) -> Tensor:
    """Discs and bars in colours on light grounds, [count, 3, side, side] in [-1, 1]: pictures that need no data set."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    made = []
    for _ in range(count):
        picture = (1 - 0.2 * torch.rand(3, generator=generator))[:, None, None].expand(3, side, side)
        for number in range(5):
            middle, size = (
                1.2 * torch.rand(2, generator=generator) - 0.6,
                0.15 + 0.4 * torch.rand(2, generator=generator),
            )
            y, x = (rows - middle[0]) / size[0], (columns - middle[1]) / size[1]
            inside = x**2 + y**2 < 1 if number % 2 else (x.abs() < 1) & (y.abs() < 0.5)
            colour = torch.rand(3, generator=generator)[:, None, None]
            picture = torch.where(inside, colour, picture)
        made.append(2 * picture - 1)
    return torch.stack(made)


def _ask(unet: UNet2DConditionModel, x: Tensor, timestep: Tensor) -> Tensor:
    """The network's float32 output for an empty condition: zeros, and for SDXL the sizes of uncropped pictures."""
    config: Any = unet.config
    count, (height, width) = len(x), x.shape[2:]
    given: dict[str, Any] = {"encoder_hidden_states": x.new_zeros(count, TOKENS, config["cross_attention_dim"])}
    if is_sdxl(config):
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        sizes = x.new_tensor([8 * height, 8 * width, 0, 0, 8 * height, 8 * width])
        given["added_cond_kwargs"] = {"text_embeds": x.new_zeros(count, pooled), "time_ids": sizes.repeat(count, 1)}
    return unet(x, timestep.to(x.dtype), **given).sample.float()


def _wanted(kind: str, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What a perfect network of this kind would put out."""
    alpha, sigma = (expand(each, data) for each in alpha_sigma(t))
    return {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * data,
        "sample": data,
        FLOW_PREDICTION: noise - data,
    }[kind]


@torch.inference_mode()
def probe_network(unet: UNet2DConditionModel, schedule: Schedule, data: Tensor) -> Reading:
    """Ask a network, in six forwards, what it predicts.

    Args:
        schedule: of its config; a flow model's has no noise levels, so that Stable Diffusion's are tried.
        data: latents [pictures, channels, height, width] like those that it was trained on.
    """
    weights = next(unet.parameters())
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(1)).to(weights)
    data = data.to(weights)
    table = schedule if isinstance(schedule, NoiseSchedule) else NoiseSchedule.from_scheduler_config(STABLE_DIFFUSION)
    left: dict[str, list[float]] = {kind: [] for kind in PREDICTION_TYPES}
    for time in FLOW_TIMES:
        t = torch.full((len(data),), time, dtype=torch.float64, device=weights.device)
        x_t, answers = interpolate(noise, data, t), {}
        for levels, like in ((table, "epsilon"), (FlowTimes(table.num_timesteps), FLOW_PREDICTION)):
            at = align(levels, like, t)
            answers[like] = _ask(unet, (expand(at.scale, x_t) * x_t).to(weights), at.timestep)
        for kind in PREDICTION_TYPES:
            wanted = _wanted(kind, data, noise, t)
            error = answers[FLOW_PREDICTION if kind == FLOW_PREDICTION else "epsilon"] - wanted
            left[kind].append(float(error.square().mean() / wanted.square().mean()))
    return Reading(left={kind: sum(values) / len(values) for kind, values in left.items()})


def _latents(base: BaseModel) -> Tensor:
    """Simple pictures as latents [pictures, channels, side, side], no larger than the network's own."""
    side = min(*base.default_size, LARGEST_SIDE * base.pixels_per_latent)
    count = min(8, PIXELS * base.pixels_per_latent**2 // side**2)
    return load_autoencoder(base).encode(simple_pictures(count, side))[0]


def _place(base: BaseModel) -> Path:
    # The same weights are asked at other levels when they are read with another schedule.
    asked = schedule_hash(base.scheduler_config)[:8]
    return cache_root() / "readings" / f"{base.content_hash}-{asked}-{VERSION}.json"


def kept_reading(base: BaseModel) -> Reading | None:
    """What was found of a base on this machine, if it was probed here."""
    place = _place(base)
    return Reading(left=json.loads(place.read_text())) if place.is_file() else None


def _way_out(base: BaseModel, found: str) -> str:
    if isinstance(base.schedule, FlowTimes):
        return "Its scheduler config has no noise levels of a diffusion model: give it that of the original model."
    return (
        f"Set prediction_type to {found!r} in its scheduler/scheduler_config.json, or say so by "
        f"--model.base-prediction {found} (--base-prediction in pipelines.generate, evaluate and export ldm)."
    )


def can_be_asked(unet: UNet2DConditionModel) -> bool:
    """Whether the network takes what is asked here: latents and text alone, or SDXL's sizes too."""
    config: Any = unet.config
    plain = not any(config.get(name) for name in ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"))
    known = config["addition_embed_type"] is None or is_sdxl(config)
    return (
        plain
        and known
        and config["in_channels"] == config["out_channels"]
        and type(config["cross_attention_dim"]) is int
    )


def check_reading(base: BaseModel, unet: UNet2DConditionModel) -> Reading:
    """Probe the base's network, once per machine.

    Raises:
        BaseModelError: it clearly predicts something else than the base's config says. If the user has said what it
            predicts, this is only a warning.
    """
    place = _place(base)
    with one_at_a_time(place):
        if (reading := kept_reading(base)) is None:
            reading = probe_network(unet, base.schedule, _latents(base))
            partial = place.with_suffix(".partial")
            partial.write_text(json.dumps(dict(reading.left)))
            partial.replace(place)
    if reading.contradicts(base.prediction_type):
        found, said = reading.best, base.prediction_type
        message = (
            f"{base.uri!r} is read as {said}, but its network puts out what a network of {found} does: it leaves "
            f"{reading.left[found]:.2f} of that unexplained, and {reading.left[said]:.2f} of {said}."
        )
        if not base.told:
            raise BaseModelError(f"{message} {_way_out(base, found)}")
        logger.warning("%s It is read as it was told.", message)
    return reading
