r"""The paper's comparison at our size: emoji-sd adapts to OpenMoji, or to another resolution, by three losses.

    python -m benchmarks.objectives --results docs/results/objectives.jsonl
    python -m benchmarks.objectives --results docs/results/resolution.jsonl --style twemoji --subset core --images 297 \
        --size 96
    python -m benchmarks.objectives --results docs/results/objectives.jsonl --methods small --rate 2 --judged-at

Every combination sees the same rows in the same order with the same noises and flow times, and is judged by a Frechet
distance (see benchmarks.frechet) of one image per caption and by the held-out flow loss, against steps and against
network evaluations. Beside them: the untrained base by DDIM and DPM-Solver++, and as a flow model (step 0). The results
file gets a line per finished combination; the same command again goes on with the ones that are missing.
"""

import copy
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import tyro
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn

from benchmarks.frechet import NAME, Features, distance
from benchmarks.plain_training import PlainTraining
from d2f_core.data.datasets.config import Fit, MakeDatasetConfig, Style, Subset
from d2f_core.data.datasets.emoji import render_rows
from d2f_core.data.sample_order import SampleOrder
from d2f_core.model.artifact import TrainedModel, load_model, to_uint8
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig
from d2f_core.model.sampling import sample_latents
from d2f_core.model.text_to_image import TextToImage
from d2f_core.objective.time_sampling import TimeSampling
from d2f_core.randomness import keyed_normal
from d2f_core.train.config import TrainConfig

Method = Literal["full", "small", "attention"]
Objective = Literal["diffusion", "flow_matching", "diff2flow"]
BATCH, HOLDOUT, CHUNK = 32, 128, 128
RATES: dict[Method, float] = {"full": 5e-4, "small": 1e-3, "attention": 2e-3}
OTHER_SOLVERS: dict[str, str] = {"diffusion": "euler", "diff2flow": "ddim"}
"""Each of the two networks can be sampled as the other one is: what is the loss's doing, and what the sampler's?"""
OTHER_EVALUATIONS = (2, 10)
TUNING = ("rate", "times")


@dataclass(frozen=True, kw_only=True)
class Config:
    results: Path
    """One JSON object per line."""
    base: str = "infra/models/emoji-sd"
    style: Style = "openmoji"
    """Whose drawings are learned."""
    subset: Subset = "all"
    """Which of them."""
    size: int = 64
    """Of the images in pixels, rendered at that size; emoji-sd was trained at 64."""
    shift: float = 1.0
    """Flow times of diff2flow's training and of Euler's sampling moved towards noise; see `shift_times`."""
    objectives: tuple[Objective, ...] = ("diff2flow", "diffusion", "flow_matching")
    methods: tuple[Method, ...] = ("full", "small", "attention")
    seeds: tuple[int, ...] = (0,)
    rate: float = 1.0
    """Factor on each method's learning rate."""
    times: Literal["uniform", "logit_normal", "mode"] = "uniform"
    """Distribution of diff2flow's flow times in training."""
    steps: int = 400
    judged_at: tuple[int, ...] = (50, 100, 200)
    """Steps at which 10 evaluations are judged, besides the last one."""
    evaluations: tuple[int, ...] = (2, 4, 10, 25)
    """Network evaluations of the last step's model and of the base."""
    threads: int = 2
    """Of torch."""
    images: int = 943
    """Images per judgement, one for each caption in turn: as many as a half of the real ones, which gives the floor."""

    @property
    def task(self) -> dict[str, Any]:
        """What is learned, where it is not OpenMoji at the base's own size."""
        return self._unusual("style", "subset", "size", "shift")

    @property
    def tuning(self) -> dict[str, Any]:
        """How it is learned, where that is not the usual way."""
        return self._unusual(*TUNING)

    def _unusual(self, *names: str) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value != Config.__dataclass_fields__[name].default}


@dataclass(frozen=True)
class Data:
    """OpenMoji as latents, and the features of its images."""

    mean: np.ndarray
    std: np.ndarray
    captions: np.ndarray
    real: Tensor

    def rows(self, rows: np.ndarray) -> dict[str, Any]:
        return {
            "latent_mean": self.mean[rows],
            "latent_std": self.std[rows],
            "caption": self.captions[rows],
            "row": rows,
            "epoch": np.zeros_like(rows),
        }


def images_as_data(base_uri: str, source: MakeDatasetConfig, features: Features | None = None) -> Data:
    rows = list(render_rows(source))
    images = torch.from_numpy(
        np.stack([np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in rows])
    )
    autoencoder = load_autoencoder(resolve_base(base_uri))
    parts = [autoencoder.encode(part.permute(0, 3, 1, 2).float() / 127.5 - 1) for part in images.split(CHUNK)]
    mean, std = (torch.cat([part[i] for part in parts]).numpy() for i in range(2))
    captions = np.array([row["caption"] for row in rows], dtype=object)
    return Data(mean, std, captions, features(images) if features else torch.empty(0))


class Judge:
    """Draws one image per caption, always from the same noises, and measures the distance to the real ones."""

    def __init__(self, config: Config, data: Data, task: TextToImage, features: Features, noises: int = 1) -> None:
        self.data, self.features, self.task = data, features, task
        self.captions = [str(data.captions[i % len(data.captions)]) for i in range(config.images)]
        keys = [f"{number}/{caption}" for number, caption in enumerate(self.captions)]
        self.noise = torch.from_numpy(keyed_normal(noises, keys, data.mean.shape[1:], "judge"))
        self.autoencoder = load_autoencoder(task.base)

    @torch.no_grad()
    def __call__(self, model: TrainedModel, solver: str, steps: int, shift: float = 1.0) -> float:
        drawn = []
        for start in range(0, len(self.captions), CHUNK):
            states = self.task.text_states(self.captions[start : start + CHUNK])
            noise = self.noise[start : start + CHUNK]
            given: dict[str, Any] = {"solver": solver, "steps": steps, "guidance": 1.0, "shift": shift}
            latents, _ = sample_latents(model, noise, states, states, **given)
            drawn.append(self.features(to_uint8(self.autoencoder.decode(latents))))
        return distance(torch.cat(drawn), self.data.real)


def order_of(data: Data, seed: int) -> SampleOrder:
    """The whole table is shuffled as one window; of a small one at most an eighth is held out."""
    rows = len(data.captions)
    held_out = min(HOLDOUT, rows // 8)
    return SampleOrder(num_rows=rows, holdout_rows=held_out, seed=seed, batch=BATCH, window_rows=rows)


def own_solver(objective: str) -> str:
    return "ddim" if objective == "diffusion" else "euler"


def validation(task: TextToImage, data: Data, order: SampleOrder) -> float:
    with torch.no_grad():
        total, count = task.validation_loss(task.module, data.rows(order.holdout()))
    return total / count


def task_for(config: Config, objective: Objective, method: Method, seed: int) -> TextToImage:
    lora = LoraConfig(preset="" if method == "full" else method)
    flow = TimeSampling(distribution=config.times, shift=config.shift)
    chosen = ModelConfig(
        base=config.base,
        objective=objective,
        method="full" if method == "full" else "lora",
        lora=lora,
        caption_dropout=0.0,
        times=TimeSampling() if objective == "diffusion" else flow,
    )
    return TextToImage(resolve_base(config.base), chosen, seed=seed, dtype=torch.float32, device="cpu")


def training_of(config: Config, task: TextToImage, data: Data, order: SampleOrder, rate: float) -> PlainTraining:
    return PlainTraining(
        task, data.rows, order, TrainConfig(num_steps=config.steps, learning_rate=rate, warmup_steps=20)
    )


def run_baseline(config: Config, data: Data, features: Features) -> Iterator[dict[str, Any]]:
    """The base as it is: DDIM, DPM-Solver++, and Euler in flow time (step 0 of every diff2flow training).

    With a shift step 0 alone: it is Euler's, and to the others nothing new.
    """
    task = task_for(config, "diff2flow", "full", 0)
    judge, base = Judge(config, data, task, features), load_model(config.base)
    for solver in ("ddim", "dpm++") if config.shift == 1 else ():
        found = {steps: judge(base, solver, steps) for steps in config.evaluations}
        yield {"what": solver, NAME: found}
    others = [Judge(config, data, task, features, noises=noises) for noises in (2, 3)]
    for other in others if config.shift == 1 else ():  # the control: the same sampler from other noises
        yield {"what": "ddim, other noises", NAME: {steps: other(base, "ddim", steps) for steps in config.evaluations}}
    untrained = task.model(task.module)
    found = {steps: judge(untrained, "euler", steps, config.shift) for steps in config.evaluations}
    half = torch.randperm(len(data.real), generator=torch.Generator().manual_seed(0))
    floor = distance(*(data.real[part] for part in half.chunk(2)))
    order = order_of(data, 0)
    yield {"what": "step 0", NAME: found, "flow_loss": validation(task, data, order)}
    yield {"what": "two halves of the real images", NAME: floor}


def merged(network: nn.Module) -> nn.Module:
    """A copy with its adapters in its weights, if it has any: half as much work in each of many evaluations."""
    return cast(Any, copy.deepcopy(network)).merge_and_unload() if isinstance(network, PeftModel) else network


def run_one(
    config: Config, data: Data, features: Features, objective: Objective, method: Method, seed: int
) -> dict[str, Any]:
    began = time.perf_counter()
    task = task_for(config, objective, method, seed)
    judge = Judge(config, data, task, features)
    order = order_of(data, seed)
    curve = []
    for point in training_of(config, task, data, order, config.rate * RATES[method]).run(config.judged_at):
        last = point["step"] == config.steps
        counts = config.evaluations if last else (10,)
        model, solver = task.model(merged(task.module)), own_solver(objective)
        found = {count: judge(model, solver, count, config.shift) for count in counts}
        curve.append({**point, NAME: found, "flow_loss": validation(task, data, order)})
        if last and objective in OTHER_SOLVERS:
            other = OTHER_SOLVERS[objective]
            curve[-1][f"by {other}"] = {count: judge(model, other, count) for count in OTHER_EVALUATIONS}
        print(f"  {objective} {method} seed {seed}: {curve[-1]}", flush=True)
    return {"curve": curve, "seconds": time.perf_counter() - began}


def base_key(uri: str) -> str:
    """Short hash of a base model."""
    return resolve_base(uri).content_hash[:12]


def main() -> None:
    config = tyro.cli(Config)
    torch.set_num_threads(config.threads)
    lines = config.results.read_text().splitlines() if config.results.exists() else []
    done = {json.dumps(json.loads(line)["of"], sort_keys=True) for line in lines}
    features = Features()
    # The base knows Twemoji as it lies on its canvas; OpenMoji's margins are wider, and are cut.
    fit: Fit = "drawing" if config.style == "openmoji" else "canvas"
    source = MakeDatasetConfig(style=config.style, subset=config.subset, fit=fit, size=config.size)
    data = images_as_data(config.base, source, features)
    # By content: the same path may hold another network later.
    common = {"base": base_key(config.base), "steps": config.steps, "images": config.images, **config.task}

    def keep(of: dict[str, Any], result: dict[str, Any]) -> None:
        with config.results.open("a") as file:
            file.write(json.dumps({"of": of, "base_uri": config.base, **result}) + "\n")

    baseline = {**common, "steps": 0, "objective": "none"}
    if json.dumps(baseline, sort_keys=True) not in done:
        keep(baseline, {"rows": list(run_baseline(config, data, features))})
    for seed in config.seeds:
        for method in config.methods:
            for objective in config.objectives:
                of = {**common, **config.tuning, "objective": objective, "method": method, "seed": seed}
                if json.dumps(of, sort_keys=True) not in done:
                    keep(of, run_one(config, data, features, objective, method, seed))


if __name__ == "__main__":
    main()
