"""Depth by two losses: a base model learns it from rendered scenes as a diffusion model and as a flow model.

    python -m benchmarks.v_twin --output /data/emoji-sd-v
    ray job submit --working-dir . -- python -m pipelines.workflow depth --decoder.base /data/emoji-sd-v
    python -m benchmarks.depth --results docs/results/depth.json --figure docs/depth.png --sheet docs/depth_sheet.png

Both see the same rows in the same order with the same noises, and are judged on scenes of other objects: AbsRel and
the like after a least squares fit, at 1, 2, 4 and 10 network evaluations per member, beside what can be said without
looking at the image. The state of the trainings is kept in `--state`; the same command goes on there.
"""

import importlib
import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image

from benchmarks.plain_training import PlainTraining
from d2f_core.data.arrays import table_to_arrays
from d2f_core.data.depth import clean_depth
from d2f_core.data.depth_files import decode_depth
from d2f_core.data.image_rules import ImageRules
from d2f_core.data.images import prepare_image
from d2f_core.data.manifest import read_manifest
from d2f_core.data.sample_order import SampleOrder
from d2f_core.data.table_reader import RowReader
from d2f_core.flow.depth.config import FLOORS
from d2f_core.flow.depth.errors import depth_errors, depth_sums, estimate_metric, floor_maps, mean_depth, square
from d2f_core.flow.depth.figures import ShownDepth, draw_errors, draw_maps
from d2f_core.flow.depth.metrics import METRICS
from d2f_core.flow.depth.predictor import DepthPredictor, fill_settings
from d2f_core.flow.latents import check_fingerprint
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import resolve_base
from d2f_core.model.config import ModelConfig
from d2f_core.model.image_to_depth import ImageToDepth
from d2f_core.objective.time_sampling import TimeSampling
from d2f_core.train.config import TrainConfig
from pipelines.names import DEPTH_BASE

Objective = Literal["diffusion", "diff2flow"]
HOLDOUT, EVERY = 64, 100
"""Rows that are only validated on, and steps between two savings of the state."""
SOLVERS = {"diffusion": "ddim", "diff2flow": "euler"}
FOCAL, BASELINE, OFFSET = 994.978, 0.193001, 31.086
"""Of the real pair: pixels, metres, pixels. Source: the description of scikit-image's `stereo_motorcycle`."""


@dataclass(frozen=True, kw_only=True)
class Config:
    results: Path
    """JSON."""
    figure: Path
    sheet: Path
    state: Path = Path(".local/depth-benchmark")
    """Directory of what a second run goes on from; another one for other settings."""
    base: str = DEPTH_BASE
    latents: str = "s3://d2f/latents/depth"
    """Depth latent table to train on."""
    train: str = "s3://d2f/datasets/depth"
    """The depth table that it was made of, for the floor of its mean."""
    test: str = "s3://d2f/datasets/depth-test"
    """Depth table to judge on."""
    objectives: tuple[Objective, ...] = ("diffusion", "diff2flow")
    steps: int = 3000
    batch: int = 32
    rate: float = 1e-3
    shift: float = 4.0
    """Flow times of diff2flow's training moved towards noise, where the image is all there is to see."""
    seed: int = 0
    evaluations: tuple[int, ...] = (1, 2, 4, 10)
    """Network evaluations of each member."""
    ensembles: tuple[int, ...] = (1, 4)
    """Numbers of members that are judged."""
    images: int = 400
    """Of the test table, from the first on."""
    shown: int = 6
    threads: int = 2
    """Of torch."""

    @property
    def training(self) -> dict[str, Any]:
        """What must stay the same for a state to belong to this run."""
        names = ("base", "latents", "test", "steps", "batch", "rate", "shift", "seed", "images")
        return {name: getattr(self, name) for name in names}


def task_for(config: Config, objective: Objective) -> ImageToDepth:
    times = TimeSampling(shift=config.shift if objective == "diff2flow" else 1.0)
    chosen = ModelConfig(base=config.base, task="image_to_depth", objective=objective, method="full", times=times)
    return ImageToDepth(resolve_base(config.base), chosen, seed=config.seed, dtype=torch.float32, device="cpu")


def read_all(uri: str, columns: tuple[str, ...], most: int | None = None) -> Iterator[dict[str, Any]]:
    manifest = read_manifest(uri)
    reader, rows = RowReader(uri, manifest, columns), min(manifest.num_rows, most or manifest.num_rows)
    for start in range(0, rows, 256):
        yield from reader.read(np.arange(start, min(start + 256, rows))).to_pylist()


def read_latents(config: Config, task: ImageToDepth) -> dict[str, Any]:
    """The whole table: some 10 MB."""
    manifest = read_manifest(config.latents)
    check_fingerprint(manifest, autoencoder_fingerprint(task.base))
    return table_to_arrays(
        RowReader(config.latents, manifest, task.columns).read(np.arange(manifest.num_rows)), task.columns
    )


def train(config: Config, task: ImageToDepth, objective: Objective) -> list[dict[str, float]]:
    """Train to the end, from the kept state if there is one; leaves the averaged weights in the task's module."""
    table = read_latents(config, task)
    rows = len(table["caption"])
    order = SampleOrder(num_rows=rows, holdout_rows=HOLDOUT, seed=config.seed, batch=config.batch, window_rows=rows)
    settings = TrainConfig(num_steps=config.steps, learning_rate=config.rate, warmup_steps=50, decay="cosine")

    def columns(chosen: np.ndarray) -> dict[str, Any]:
        return {name: values[chosen] for name, values in table.items()}

    training = PlainTraining(task, columns, order, settings, state=config.state / f"{objective}.pt")
    for point in training.run(range(EVERY, config.steps, EVERY)):
        print(f"  {objective}: {point}", flush=True)
    held = order.holdout()
    total, count = task.validation_loss(task.module, {**columns(held), "row": held})
    return [*training.curve, {"step": config.steps, "validation_flow_loss": total / count}]


@dataclass(frozen=True, kw_only=True)
class JudgedImage:
    name: str
    pixels: np.ndarray
    truth: np.ndarray


def judged_images(config: Config, size: int) -> list[JudgedImage]:
    rules = ImageRules(resolution=size, min_side=1, max_pixels=50_000_000)
    return [
        JudgedImage(
            name=row["sample_id"],
            pixels=prepare_image(row["image"], rules).pixels,
            truth=square(decode_depth(row["depth"])),
        )
        for row in read_all(config.test, ("sample_id", "image", "depth"), config.images)
    ]


def real_image(size: int) -> JudgedImage | None:
    """The Middlebury motorcycle, if scikit-image and its data are there."""
    try:
        left, _, disparity = importlib.import_module("skimage.data").stereo_motorcycle()
    except Exception as error:  # not installed, no pooch, no network: each is a reason to go without
        print(f"no real pair: scikit-image's stereo_motorcycle is not there ({type(error).__name__}: {error})")
        return None
    sink = io.BytesIO()
    Image.fromarray(left).save(sink, format="PNG")
    pixels = prepare_image(sink.getvalue(), ImageRules(resolution=size, min_side=1, max_pixels=50_000_000)).pixels
    depth = clean_depth(FOCAL * BASELINE / (np.asarray(disparity, np.float64) + OFFSET))
    return JudgedImage(name="motorcycle", pixels=pixels, truth=square(depth))


def predict(
    predictor: DepthPredictor, images: list[JudgedImage], solver: str, count: int, ensemble: int
) -> list[np.ndarray]:
    settings = fill_settings(predictor.model, solver=solver, steps=count, shift=1.0, ensemble=ensemble)
    maps = []
    for start in range(0, len(images), 32):
        part = images[start : start + 32]
        made = predictor.predict(np.stack([image.pixels for image in part]), [image.name for image in part], settings)
        for one in made:
            if one.depth is None:
                raise ValueError(f"{one.error}. The training has diverged: lower --rate.")
            maps.append(one.depth)
    return maps


def judge(
    config: Config, task: ImageToDepth, objective: Objective, images: list[JudgedImage]
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Errors by role and evaluations, and the maps of the images to show (the last `shown`, one member)."""
    predictor = DepthPredictor(task.model(task.module.eval()))
    errors: dict[str, Any] = {}
    maps: dict[str, list[np.ndarray]] = {}
    judged, shown = images[: len(images) - config.shown], images[-config.shown :]
    for ensemble in config.ensembles:
        role = objective if ensemble == 1 else f"{objective}, {ensemble} members"
        for count in config.evaluations:
            found = predict(predictor, judged, SOLVERS[objective], count, ensemble)
            each = [depth_errors(depth, image.truth) for depth, image in zip(found, judged, strict=True)]
            errors.setdefault(role, {})[count] = each
            print(f"  {role} at {count}: AbsRel {np.mean([one['abs_rel'] for one in each]):.4f}", flush=True)
            if ensemble == config.ensembles[0]:
                maps[f"{objective} {count}"] = predict(predictor, shown, SOLVERS[objective], count, ensemble)
    return errors, maps


def main() -> None:
    config = tyro.cli(Config)
    torch.set_num_threads(config.threads)
    config.state.mkdir(parents=True, exist_ok=True)
    _claim(config)
    size = max(resolve_base(config.base).default_size)
    images, real = judged_images(config, size), real_image(size)
    shown = [*images[: config.shown - bool(real)], *([real] if real else [])]
    truths = (decode_depth(row["depth"]) for row in read_all(config.train, ("depth",)))
    floors = floor_maps(mean_depth(depth_sums(truths, size, squares=True)))
    errors: dict[str, Any] = {
        name: {0: [depth_errors(values, image.truth) for image in images]} for name, values in floors.items()
    }
    maps: dict[str, list[np.ndarray]] = {}
    curves, seconds = {}, {}
    for objective in config.objectives:
        began = time.perf_counter()
        task = task_for(config, objective)
        curves[objective] = train(config, task, objective)
        found, pictures = judge(config, task, objective, [*images, *shown])
        errors |= found
        maps |= pictures
        seconds[objective] = time.perf_counter() - began
    _write(config, errors, maps, shown, {"curves": curves, "seconds": seconds, "real": real})


def _claim(config: Config) -> None:
    """Raises ValueError when the state is of other settings."""
    file, now = config.state / "settings.json", json.dumps(config.training, sort_keys=True)
    if file.exists() and file.read_text() != now:
        raise ValueError(f"{config.state} holds the state of other settings: {file.read_text()}. Give another --state.")
    file.write_text(now)


def _write(config: Config, errors: Any, maps: Any, shown: list[JudgedImage], facts: dict[str, Any]) -> None:
    metrics = {
        name: estimate_metric(
            name,
            {
                role: {count: np.array([one[name] for one in each]) for count, each in by_count.items()}
                for role, by_count in errors.items()
            },
        )
        for name in METRICS
    }
    best = min(metrics["abs_rel"].values[floor][0].value for floor in FLOORS)
    real = facts.pop("real")
    results = {
        "config": {name: value for name, value in asdict(config).items() if not isinstance(value, Path)},
        "test_digest": read_manifest(config.test).digest,
        "best_floor_abs_rel": best,
        **facts,
        "real_pair": {
            name: depth_errors(values[-1], real.truth) for name, values in maps.items()
        } if real else None,
        "metrics": {name: metric.to_json() for name, metric in metrics.items()},
    }  # fmt: skip
    for file in (config.results, config.figure, config.sheet):
        file.parent.mkdir(parents=True, exist_ok=True)
    config.results.write_text(json.dumps(results, indent=1) + "\n")
    config.figure.write_bytes(draw_errors(metrics, f"depth of {len(errors[FLOORS[0]][0])} rendered scenes"))
    rows = [
        ShownDepth(image=image.pixels, truth=image.truth, predictions={name: each[row] for name, each in maps.items()})
        for row, image in enumerate(shown)
    ]
    config.sheet.write_bytes(draw_maps(rows, "image, truth, and maps by loss and network evaluations (one member)"))


if __name__ == "__main__":
    main()
