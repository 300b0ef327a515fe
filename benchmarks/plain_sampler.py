"""What a plain epsilon sampler keeps of a Diff2Flow model, and what the ComfyUI node keeps.

    python -m benchmarks.plain_sampler --results docs/results/plain_sampler.json --picture docs/plain_sampler.png

In closed form: data that are Gaussian of deviation s in one direction. Details have s = 1; the mean of a channel, by
which an image is dark or bright, has up to s = sqrt(values in the channel): 64 at 512 px. Every network and sampler is
linear there, so one number says what share of the deviation its samples have. In pixels: emoji-sd learns a black and a
white picture, as in benchmarks.brightness, and is sampled both ways from the same noise. The calls are those of
ComfyUI, written anew in benchmarks.comfy_protocol.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.brightness import SIZE, TARGETS, BrightnessConfig, round_trip, targets
from benchmarks.closed_form import Mixture, gaussian
from benchmarks.comfy_protocol import Diffusion, Patcher, load_node, normal, sample, simple, stand_in
from benchmarks.objective_recipes import BATCH, RATES, Method, task_for, training_of
from d2f_core.data.sample_order import SampleOrder
from d2f_core.model.artifact import to_uint8
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.text_to_image import TextToImage
from d2f_core.objective.alignment import VelocityField, align
from d2f_core.objective.schedule import NoiseSchedule
from d2f_core.objective.solver import Field, integrate, uniform_times
from d2f_core.randomness import keyed_normal

DEVIATIONS = (1.0, 8.0, 32.0, 64.0)
SHIFTS = (1.0, 3.0, 6.0)
SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SAMPLERS = ("plain", "node")
PER_CAPTION = 4
"""Images of each caption on the picture, for each sampler."""


@dataclass(frozen=True, kw_only=True)
class PlainSamplerConfig:
    results: Path
    picture: Path
    base: str = "infra/models/emoji-sd"
    evaluations: tuple[int, ...] = (4, 10, 25)
    method: Method = "full"
    """What of emoji-sd is trained."""
    steps: int = 150
    """Training steps of emoji-sd, of 32 samples."""
    state: Path | None = None
    """File that the training is kept in, so that a stopped command goes on from it."""
    images: int = 32
    """Drawn per caption and measurement."""
    threads: int = 2
    """Of torch."""


def trained_last_level(schedule: NoiseSchedule, deviation: float) -> float:
    """Slope of the noise estimate that Diff2Flow's loss gives the last level on this data.

    That level answers for all flow times below its own at once, so it is the least squares fit over them.
    """
    low = schedule.trained_range[0]
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * low
    at = align(schedule, "epsilon", t)
    power = at.scale**2 * (t**2 * deviation**2 + (1 - t) ** 2)
    with_velocity = at.scale * (t * deviation**2 - (1 - t))
    fitted = at.from_prediction * (with_velocity - at.from_x * power)
    return float(fitted.sum() / (at.from_prediction**2 * power).sum())


def trained_network(schedule: NoiseSchedule, data: Mixture) -> Callable[..., Tensor]:
    """The best epsilon network for this data at every level, and at the last one what Diff2Flow's loss makes of it."""
    base, slope = data.denoiser(schedule, "epsilon", torch.float64), trained_last_level(schedule, data.std)

    def network(x_dm: Tensor, timestep: Tensor) -> Tensor:
        last = (timestep >= schedule.num_timesteps - 1)[:, None]
        return torch.where(last, slope * x_dm, base(x_dm, timestep))

    return network


def closed_form(evaluations: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Share of the deviation that samples have; 1 is right."""
    schedule, one = NoiseSchedule.from_scheduler_config(SD), torch.ones(1, 1, dtype=torch.float64)
    for deviation in DEVIATIONS:
        data = gaussian(deviation, dims=1)
        networks = {
            "base": data.denoiser(schedule, "epsilon", torch.float64),
            "trained": trained_network(schedule, data),
        }
        for steps in evaluations:
            of = {"deviation": deviation, "evaluations": steps}
            for name, network in networks.items():
                plain = Diffusion(schedule, "epsilon")
                kept = sample(Patcher(network, plain), one, normal(plain, steps)) / deviation
                yield {**of, "network": name, "sampler": "plain", "kept": round(float(kept), 3)}
            fields: dict[str, Field] = {
                name: VelocityField(each, schedule, "epsilon") for name, each in networks.items()
            }
            for name, field in {**fields, "exact RF": data.velocity}.items():
                for shift in SHIFTS:
                    end, _ = integrate(field, one, uniform_times(steps, shift))
                    kept = round(float(end) / deviation, 3)
                    yield {**of, "network": name, "sampler": f"flow, shift {shift:g}", "kept": kept}


def trained_emoji(config: PlainSamplerConfig) -> TextToImage:
    """emoji-sd after a short training on a black and a white picture by Diff2Flow's loss."""
    task = task_for(config.base, "diff2flow", config.method, 0)
    data = targets(task)
    order = SampleOrder(num_rows=len(data.captions), seed=0, batch=BATCH)
    training = training_of(task, data.rows, order, config.steps, RATES[config.method], config.state)
    for look in training.run(range(0, config.steps, 10)):
        print(json.dumps(look), flush=True)
    return task


@torch.no_grad()
def drawn(config: PlainSamplerConfig, task: TextToImage, sampler: str, steps: int, caption: str) -> Tensor:
    """Pixels uint8 [images, height, width, 3] from the same noise for either sampler."""
    autoencoder = load_autoencoder(task.base)
    keys = [f"{caption}/{number}" for number in range(config.images)]
    noise = torch.from_numpy(keyed_normal(1, keys, task.base.latent_shape(SIZE, SIZE), "judge"))
    model = task.model(task.module)
    schedule = NoiseSchedule.from_scheduler_config(model.base.scheduler_config)
    patcher = Patcher(model.denoiser, Diffusion(schedule, model.base.prediction_type))
    if sampler == "node":
        with stand_in({}):
            node = load_node().NODE_CLASS_MAPPINGS["Diff2FlowSampling"]()
            patcher, _ = node.patch(patcher, "(none)", "epsilon", "scaled_linear", 1.0)
    sampling = patcher.get_model_object("model_sampling")
    sigmas = (simple if sampler == "node" else normal)(sampling, steps).float()
    states = task.text_states([caption] * config.images)
    return to_uint8(autoencoder.decode(sample(patcher, noise, sigmas, condition={"text_states": states})))


def _in_pixels(config: PlainSamplerConfig) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Mean brightness of each caption's images, and the images."""
    task = trained_emoji(config)
    for steps in config.evaluations:
        for sampler in SAMPLERS:
            for caption in TARGETS:
                images = drawn(config, task, sampler, steps, caption)
                means = images.float().mean((1, 2, 3)) / 255
                found = {"mean": round(float(means.mean()), 4), "deviation": round(float(means.std()), 4)}
                yield {"caption": caption, "evaluations": steps, "sampler": sampler, **found}, images


def _picture(images: dict[tuple[str, str], Tensor], steps: int, path: Path) -> None:
    """A row per caption: on the left plain sampling, on the right the node, from the same noise, at twice the size."""
    side, gap, head = 2 * SIZE, 8, 30
    half = PER_CAPTION * (side + gap)
    sheet = Image.new("RGB", (2 * half + 3 * gap, head + len(TARGETS) * (side + head)), "#b8c0c8")
    write, large = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for column, sampler in enumerate(SAMPLERS):
        left = gap + column * (half + gap)
        name = "plain epsilon sampler" if sampler == "plain" else "as the flow that it is (the node)"
        write.text((left, 6), f"{name}, {steps} evaluations", fill="black", font=large)
        for row, caption in enumerate(TARGETS):
            top = head + row * (side + head)
            for number, one in enumerate(images[sampler, caption][:PER_CAPTION].numpy()):
                sheet.paste(Image.fromarray(one).resize((side, side)), (left + number * (side + gap), top))
            write.text((left, top + side + 5), f'"{caption}"', fill="black", font=large)
    sheet.quantize(128).save(path, optimize=True)


def main() -> None:
    config = tyro.cli(PlainSamplerConfig)
    torch.set_num_threads(config.threads)
    closed = list(closed_form(config.evaluations))
    pixels, last = [], {}
    for entry, images in _in_pixels(config):
        pixels.append(entry)
        last[entry["sampler"], entry["caption"]] = images
        print(json.dumps(entry), flush=True)
    limits = round_trip(BrightnessConfig(results=config.results, base=config.base))
    found = {"closed_form": closed, "autoencoder": limits, "pixels": pixels}
    text = json.dumps(found).replace('{"deviation', '\n{"deviation').replace('{"caption', '\n{"caption')
    config.results.write_text(text + "\n")
    _picture(last, max(config.evaluations), config.picture)


if __name__ == "__main__":
    main()
