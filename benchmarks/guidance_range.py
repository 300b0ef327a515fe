r"""How the models of `benchmarks.objectives` bear classifier-free guidance, at 10 evaluations.

    python -m benchmarks.guidance_range --weights DIRECTORY --results docs/results/guidance.json

Distance to the drawings that were learned, and the share of values that lie at the end of their range (burnt), for the
untrained base and for weights that `benchmarks.objectives --keep DIRECTORY` left.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from safetensors.torch import load_file

from benchmarks.frechet import NAME, Features, distance
from benchmarks.objective_judging import Data, Judge, images_as_data
from benchmarks.objective_recipes import LOSSES, Method, Objective, task_for
from benchmarks.objectives import base_key, merged
from d2f_core.data.datasets.config import MakeDatasetConfig
from d2f_core.model.artifact import load_model, load_weights
from d2f_core.model.text_to_image import TextToImage
from d2f_core.model.trained_model import TrainedModel

EVALUATIONS = 10
BURNT = 2
"""Values of a uint8 picture this near to 0 or 255 count as burnt, but for the ground, which is white by nature."""


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    weights: Path
    results: Path
    base: str = "infra/models/emoji-sd"
    method: Method = "small"
    objectives: tuple[Objective, ...] = ("diff2flow", "naive", "diffusion")
    seed: int = 0
    scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 7.5, 10.0)
    images: int = 297
    """Drawn per scale, one for each caption in turn."""
    threads: int = 2
    """Of torch."""


def measure(judge: Judge, data: Data, model: TrainedModel, solver: str, scale: float) -> dict[str, float]:
    images = judge.draw(model, solver, EVALUATIONS, 1.0, scale)
    burnt = ((images < BURNT) | ((images > 255 - BURNT) & (images.amin(-1, keepdim=True) < 250))).float().mean()
    return {NAME: distance(judge.features(images), data.real), "burnt": float(burnt)}


def trained(config: GuidanceConfig, objective: Objective) -> TextToImage | None:
    """The task with the weights of a finished training; None if there are none."""
    name = f"{base_key(config.base)}-{objective}-{config.method}-{config.seed}.safetensors"
    if not (config.weights / name).exists():
        return None
    task = task_for(config.base, objective, config.method, config.seed)
    load_weights(task.module, load_file(config.weights / name))
    return task


def main() -> None:
    config = tyro.cli(GuidanceConfig)
    torch.set_num_threads(config.threads)
    features = Features()
    source = MakeDatasetConfig(style="openmoji", subset="all", fit="drawing", size=64)
    data = images_as_data(config.base, source, features)
    found: dict[str, Any] = json.loads(config.results.read_text()) if config.results.exists() else {}
    plain = task_for(config.base, "diff2flow", "full", 0)
    models: dict[str, tuple[TrainedModel, str]] = {"base, DDIM": (load_model(config.base), "ddim-clean")}
    models["base as a flow"] = (plain.model(plain.module), "euler")
    for objective in config.objectives:
        if task := trained(config, cast(Objective, objective)):
            models[f"{objective}, {config.method}"] = (task.model(merged(task.module)), LOSSES[objective].solver)
    judge = Judge(config.images, data, plain, features)
    for name, (model, solver) in models.items():
        for scale in config.scales:
            if f"{scale:g}" not in found.setdefault(name, {}):
                found[name][f"{scale:g}"] = measure(judge, data, model, solver, scale)
                config.results.write_text(json.dumps(found, indent=1) + "\n")
                print(name, scale, found[name][f"{scale:g}"], flush=True)


if __name__ == "__main__":
    main()
