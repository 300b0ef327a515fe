"""Images as latents, and the judgements of `benchmarks.objectives`."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.frechet import NAME, Features, distance
from benchmarks.objective_recipes import BATCH
from d2f_core.data.datasets.config import MakeDatasetConfig
from d2f_core.data.datasets.emoji import render_rows
from d2f_core.data.sample_order import SampleOrder
from d2f_core.flow.evaluate.config import MeasureConfig
from d2f_core.flow.evaluate.image_metrics import FeaturePart, noise_floor
from d2f_core.model.artifact import TrainedModel, to_uint8
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import resolve_base
from d2f_core.model.sampling import sample_latents
from d2f_core.model.text_to_image import TextToImage
from d2f_core.randomness import keyed_normal

HOLDOUT, CHUNK = 128, 128


@dataclass(frozen=True)
class Data:
    """Images as latents, and their features."""

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

    def __init__(self, images: int, data: Data, task: TextToImage, features: Features, noises: int = 1) -> None:
        self.data, self.features, self.task = data, features, task
        self.captions = [str(data.captions[i % len(data.captions)]) for i in range(images)]
        keys = [f"{number}/{caption}" for number, caption in enumerate(self.captions)]
        self.noise = torch.from_numpy(keyed_normal(noises, keys, data.mean.shape[1:], "judge"))
        self.autoencoder = load_autoencoder(task.base)

    def __call__(
        self, model: TrainedModel, solver: str, steps: int, shift: float = 1.0, guidance: float = 1.0
    ) -> float:
        return distance(self.features(self.draw(model, solver, steps, shift, guidance)), self.data.real)

    @torch.no_grad()
    def draw(self, model: TrainedModel, solver: str, steps: int, shift: float, guidance: float) -> Tensor:
        """The images, uint8 [images, height, width, 3]."""
        drawn = []
        for start in range(0, len(self.captions), CHUNK):
            captions = self.captions[start : start + CHUNK]
            states, null = self.task.text_states(captions), self.task.text_states([""] * len(captions))
            given: dict[str, Any] = {"solver": solver, "steps": steps, "guidance": guidance, "shift": shift}
            latents, _ = sample_latents(model, self.noise[start : start + CHUNK], states, null, **given)
            drawn.append(to_uint8(self.autoencoder.decode(latents)))
        return torch.cat(drawn)


def order_of(data: Data, seed: int) -> SampleOrder:
    """The whole table is shuffled as one window; of a small one at most an eighth is held out."""
    rows = len(data.captions)
    held_out = min(HOLDOUT, rows // 8)
    return SampleOrder(num_rows=rows, holdout_rows=held_out, seed=seed, batch=BATCH, window_rows=rows)


def validation(task: TextToImage, data: Data, order: SampleOrder) -> float:
    with torch.no_grad():
        total, count = task.validation_loss(task.module, data.rows(order.holdout()))
    return total / count


class Known:
    """What the base was made on: how well a model that adapts to something else still knows it."""

    def __init__(self, base: str, size: int, features: Features, shift: float = 1.0) -> None:
        source = MakeDatasetConfig(style="twemoji", subset="core", size=size)
        self.data, self._features, self._shift = images_as_data(base, source, features), features, shift

    def loss_of(self, task: TextToImage) -> dict[str, float]:
        """The flow loss of some of these images."""
        return {"known_flow_loss": validation(task, self.data, order_of(self.data, 0))}

    def distance_of(self, model: TrainedModel, solver: str, task: TextToImage) -> dict[str, float]:
        """The distance at 10 evaluations of one image per caption."""
        judge = Judge(len(self.data.captions), self.data, task, self._features)
        return {f"known_{NAME}": judge(model, solver, 10, self._shift)}


def floor(real: np.ndarray, images: int) -> float:
    """The distance that so many images of the real ones' own distribution would have."""
    part = FeaturePart(rows=np.arange(len(real)), features=real, caption_scores=None)
    return noise_floor([part], total=len(real), made=images, config=MeasureConfig())["frechet"].value
