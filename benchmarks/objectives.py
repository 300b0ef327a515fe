r"""The paper's comparison at our size: emoji-sd adapts to OpenMoji, or to another resolution, by five losses.

    python -m benchmarks.objectives --results docs/results/objectives.jsonl --tune 0.5 1 2 --seeds 0 1
    python -m benchmarks.objectives --results docs/results/resolution.jsonl --style twemoji --subset core --images 297 \
        --size 96 --objectives naive

Every combination sees the same rows in the same order with the same noises and flow times, and is judged by a Frechet
distance (see benchmarks.frechet) of one image per caption and by the held-out flow loss, against steps and against
network evaluations; and by the flow loss and the distance on what the base was made on, which it may forget. With
`--tune`, each loss and method is first trained for half the steps at each of these factors on its learning rate, with
seed 0 and without an image, and the factor with the lowest held-out flow loss is taken. Beside them: the untrained base
by DDIM and DPM-Solver++, and as a flow model (step 0). The results file gets a line per finished training; the same
command again goes on with the ones that are missing.
"""

import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from benchmarks.frechet import NAME, Features
from benchmarks.objective_judging import Data, Judge, Known, floor, images_as_data, order_of, validation
from benchmarks.objective_recipes import LOSSES, RATES, Method, Objective, task_for, training_of
from d2f_core.data.datasets.config import Fit, MakeDatasetConfig, Style, Subset
from d2f_core.model.artifact import load_model
from d2f_core.model.base import resolve_base
from d2f_core.model.text_to_image import TextToImage
from d2f_core.objective.time_sampling import TimeSampling

OTHER_SOLVERS: dict[str, str] = {"diffusion": "euler", "diff2flow": "ddim-clean"}
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
    objectives: tuple[Objective, ...] = ("diff2flow", "naive", "naive_logit_normal", "published", "diffusion")
    methods: tuple[Method, ...] = ("full", "small", "attention")
    seeds: tuple[int, ...] = (0,)
    rate: float = 1.0
    """Factor on each method's learning rate."""
    tune: tuple[float, ...] = ()
    """Factors to choose from, in place of `rate`; see above."""
    times: Literal["uniform", "logit_normal", "mode"] = "uniform"
    """Distribution of diff2flow's flow times in training."""
    steps: int = 400
    judged_at: tuple[int, ...] = (50, 100, 200)
    """Steps at which 10 evaluations are judged, besides the last one."""
    evaluations: tuple[int, ...] = (2, 4, 10, 25)
    """Network evaluations of the last step's model and of the base."""
    threads: int = 2
    """Of torch."""
    keep: Path | None = None
    """Directory for the trained weights."""
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


def trainee(config: Config, objective: Objective, method: Method, seed: int) -> TextToImage:
    """What one combination trains; `times` and `shift` of the config are those of losses with uniform times."""
    flow = TimeSampling(distribution=config.times, shift=config.shift)
    own = flow == TimeSampling() or LOSSES[objective].times != TimeSampling()
    return task_for(config.base, objective, method, seed, None if own else flow)


def run_baseline(config: Config, data: Data, features: Features) -> Iterator[dict[str, Any]]:
    """The base as it is: DDIM, DPM-Solver++, and Euler in flow time (step 0 of every diff2flow training).

    With a shift step 0 alone: it is Euler's, and to the others nothing new.
    """
    task = task_for(config.base, "diff2flow", "full", 0)
    judge, base = Judge(config.images, data, task, features), load_model(config.base)
    for solver in ("ddim-clean", "dpm++") if config.shift == 1 else ():
        found = {steps: judge(base, solver, steps) for steps in config.evaluations}
        yield {"what": solver, NAME: found}
    others = [Judge(config.images, data, task, features, noises=noises) for noises in (2, 3)]
    for other in others if config.shift == 1 else ():  # the control: the same sampler from other noises
        found = {steps: other(base, "ddim-clean", steps) for steps in config.evaluations}
        yield {"what": "ddim-clean, other noises", NAME: found}
    untrained = task.model(task.module)
    found = {steps: judge(untrained, "euler", steps, config.shift) for steps in config.evaluations}
    order = order_of(data, 0)
    yield {"what": "step 0", NAME: found, "flow_loss": validation(task, data, order)}
    for name in ("naive", "published"):
        naive = task_for(config.base, cast(Objective, name), "full", 0)
        yield {"what": f"step 0, read as {name}", "flow_loss": validation(naive, data, order)}
    yield {"what": "floor", NAME: floor(data.real.numpy(), config.images)}


def merged(network: nn.Module) -> nn.Module:
    """A copy with its adapters in its weights, if it has any: half as much work in each of many evaluations."""
    return cast(Any, copy.deepcopy(network)).merge_and_unload() if isinstance(network, PeftModel) else network


def tuned(config: Config, data: Data, objective: Objective, method: Method, rate: float) -> dict[str, Any]:
    """The held-out flow loss after half the steps at a factor on the learning rate."""
    task, order = trainee(config, objective, method, 0), order_of(data, 0)
    (point,) = training_of(task, data.rows, order, config.steps // 2, rate * RATES[method]).run(())
    return {**point, "flow_loss": validation(task, data, order)}


def run_one(
    config: Config, data: Data, known: Known, features: Features, of: dict[str, Any], rate: float
) -> dict[str, Any]:
    began, objective, method = time.perf_counter(), of["objective"], of["method"]
    task = trainee(config, objective, method, of["seed"])
    judge = Judge(config.images, data, task, features)
    order, solver = order_of(data, of["seed"]), LOSSES[objective].solver
    curve = []
    for point in training_of(task, data.rows, order, config.steps, rate * RATES[method]).run(config.judged_at):
        last = point["step"] == config.steps
        counts = config.evaluations if last else (10,)
        model = task.model(merged(task.module))
        found = {count: judge(model, solver, count, config.shift) for count in counts}
        curve.append({**point, NAME: found, "flow_loss": validation(task, data, order), **known.loss_of(task)})
        if last:
            curve[-1] |= known.distance_of(model, solver, task)
            if other := OTHER_SOLVERS.get(objective):
                curve[-1][f"by {other}"] = {count: judge(model, other, count) for count in OTHER_EVALUATIONS}
        print(f"  {objective} {method} seed {of['seed']}: {curve[-1]}", flush=True)
    if config.keep:
        config.keep.mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach() for name, p in task.module.named_parameters() if p.requires_grad}
        save_file(weights, config.keep / f"{of['base']}-{objective}-{method}-{of['seed']}.safetensors")
    return {"curve": curve, "rate": rate * RATES[method], "seconds": time.perf_counter() - began}


def base_key(uri: str) -> str:
    """Short hash of a base model."""
    return resolve_base(uri).content_hash[:12]


class Results:
    """A file with a line per finished part."""

    def __init__(self, config: Config) -> None:
        self.file, self.base = config.results, config.base

    def found(self, of: dict[str, Any]) -> dict[str, Any] | None:
        """The line of a part that is finished."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return next((line for line in map(json.loads, lines) if line["of"] == of), None)

    def get(self, of: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The line of a part, which is made if it is missing."""
        if (line := self.found(of)) is None:
            line = {"of": of, "base_uri": self.base, **make()}
            with self.file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return line


def best_rate(config: Config, data: Data, results: Results, common: dict[str, Any], **which: Any) -> float:
    """The factor on the learning rate with the lowest held-out flow loss."""
    losses = {}
    for rate in config.tune:
        of = {**common, "steps": config.steps // 2, "tuning": rate, **which}
        losses[rate] = results.get(of, partial(tuned, config, data, rate=rate, **which))["flow_loss"]
    return min(losses, key=lambda rate: losses[rate])


def main() -> None:
    config = tyro.cli(Config)
    torch.set_num_threads(config.threads)
    results, features = Results(config), Features()
    # The base knows Twemoji as it lies on its canvas; OpenMoji's margins are wider, and are cut.
    fit: Fit = "drawing" if config.style == "openmoji" else "canvas"
    source = MakeDatasetConfig(style=config.style, subset=config.subset, fit=fit, size=config.size)
    data, known = images_as_data(config.base, source, features), Known(config.base, config.size, features, config.shift)
    # By content: the same path may hold another network later.
    common = {"base": base_key(config.base), "steps": config.steps, "images": config.images, **config.task}
    baseline = {**common, "steps": 0, "objective": "none", "end": "clean"}
    results.get(baseline, lambda: {"rows": list(run_baseline(config, data, features))})
    for seed, method, objective in itertools.product(config.seeds, config.methods, config.objectives):
        which: dict[str, Any] = {"objective": objective, "method": method}
        rate = best_rate(config, data, results, common, **which) if config.tune else config.rate
        tuning = {"tuned": rate} if config.tune else config.tuning
        end = {"end": "clean"} if objective == "diffusion" else {}
        of = {**common, **tuning, **which, "seed": seed, **end}
        results.get(of, partial(run_one, config, data, known, features, of, rate))


if __name__ == "__main__":
    main()
