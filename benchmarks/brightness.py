"""How black is "black"? A schedule without zero terminal SNR lets the start of sampling leak into the image.

    python -m benchmarks.brightness --results docs/results/brightness.json

emoji-sd learns two pictures, all black and all white, by each of the three losses. Stable Diffusion's schedule leaves
some signal in its last timestep, which pure noise at the start of sampling does not have: a model finetuned by the
diffusion loss and sampled by DDIM then cannot reach the mean of its targets. A flow starts at pure noise (t = 0).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.objective_judging import Data
from benchmarks.objective_recipes import BATCH, LOSSES, RATES, Method, Objective, task_for, training_of
from benchmarks.objectives import base_key
from d2f_core.data.sample_order import SampleOrder
from d2f_core.model.artifact import to_uint8
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import resolve_base
from d2f_core.model.sampling import sample_latents
from d2f_core.model.text_to_image import TextToImage
from d2f_core.randomness import keyed_normal

TARGETS = {"a black picture": 0.0, "a white picture": 1.0}
ROWS, SIZE = 64, 64


@dataclass(frozen=True, kw_only=True)
class BrightnessConfig:
    results: Path
    base: str = "infra/models/emoji-sd"
    objectives: tuple[Objective, ...] = ("diff2flow", "diffusion", "naive")
    methods: tuple[Method, ...] = ("full", "attention")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 150
    evaluations: tuple[int, ...] = (4, 25)
    threads: int = 2
    """Of torch."""
    images: int = 32
    """Drawn per caption and judgement."""


def pictures(captions: Iterable[str]) -> torch.Tensor:
    pixels = torch.tensor([2 * TARGETS[caption] - 1 for caption in captions])
    return pixels[:, None, None, None].expand(-1, 3, SIZE, SIZE)


def targets(task: TextToImage) -> Data:
    captions = np.array([list(TARGETS)[i % 2] for i in range(ROWS)], dtype=object)
    mean, std = (part.numpy() for part in load_autoencoder(task.base).encode(pictures(captions)))
    return Data(mean, std, captions, torch.empty(0))


def round_trip(config: BrightnessConfig) -> dict[str, float]:
    """Mean brightness of what the autoencoder makes of the targets: no model can do better."""
    autoencoder = load_autoencoder(resolve_base(config.base))
    decoded = to_uint8(autoencoder.decode(autoencoder.encode(pictures(TARGETS))[0])).float()
    return dict(zip(TARGETS, (decoded.mean((1, 2, 3)) / 255).tolist(), strict=True))


@torch.no_grad()
def brightness(config: BrightnessConfig, task: TextToImage, objective: str, steps: int) -> dict[str, Any]:
    """Mean and standard deviation over images of each caption's mean brightness, in [0, 1]."""
    autoencoder, found = load_autoencoder(task.base), {}
    for caption in TARGETS:
        states = task.text_states([caption] * config.images)
        keys = [f"{caption}/{number}" for number in range(config.images)]
        noise = torch.from_numpy(keyed_normal(1, keys, task.base.latent_shape(SIZE, SIZE), "judge"))
        latents, _ = sample_latents(
            task.model(task.module), noise, states, states, solver=LOSSES[objective].solver, steps=steps, guidance=1.0
        )
        means = to_uint8(autoencoder.decode(latents)).float().mean((1, 2, 3)) / 255
        found[caption] = {"mean": float(means.mean()), "deviation": float(means.std())}
    return found


def run_one(config: BrightnessConfig, objective: Objective, method: Method, seed: int) -> dict[str, Any]:
    task = task_for(config.base, objective, method, seed)
    data = targets(task)
    order = SampleOrder(num_rows=ROWS, seed=seed, batch=BATCH)
    (point,) = training_of(task, data.rows, order, config.steps, RATES[method]).run(())
    found = {steps: brightness(config, task, objective, steps) for steps in config.evaluations}
    return {"loss": point["loss"], "brightness": found}


def main() -> None:
    config = tyro.cli(BrightnessConfig)
    torch.set_num_threads(config.threads)
    results = json.loads(config.results.read_text()) if config.results.exists() else []
    if not results:
        results.append({"of": "the autoencoder's round trip", "brightness": round_trip(config)})
    for seed in config.seeds:
        for method in config.methods:
            for objective in config.objectives:
                of = {"base": base_key(config.base), "objective": objective, "method": method, "seed": seed}
                of["steps"] = config.steps
                if of not in [one["of"] for one in results]:
                    results.append({"of": of, **run_one(config, objective, method, seed)})
                    config.results.write_text(json.dumps(results, indent=1) + "\n")
                    print(json.dumps(results[-1]), flush=True)


if __name__ == "__main__":
    main()
