"""The flow loss of each model on images that no training saw: same rows, noises and times for all models.

A model that learns its training images by heart predicts them better and all others worse, so that this loss rises
while a distance between sets of images may still fall.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import ray
import torch

from d2f_core.batch.output import KIND as GENERATIONS
from d2f_core.data.image_rules import MAX_PIXELS_LIMIT, ImageRules
from d2f_core.data.images import prepare_image
from d2f_core.data.manifest import Manifest
from d2f_core.data.table_reader import RowReader
from d2f_core.device import reserved_device
from d2f_core.evaluation.bootstrap import bootstrap_counts
from d2f_core.evaluation.config import FLOW_LOSS
from d2f_core.evaluation.estimates import Estimate, Metric
from d2f_core.flow.evaluate.compared_models import EvaluateJob
from d2f_core.flow.evaluate.image_metrics import REAL_DRAWS, at_random
from d2f_core.model.artifact import load_model
from d2f_core.model.autoencoder import autoencoder_fingerprint, load_autoencoder
from d2f_core.model.image_sizes import sizes_of_new_images
from d2f_core.model.text_encoder import load_text_encoder
from d2f_core.objective.loss import flow_validation_loss
from d2f_core.randomness import keyed_normal
from d2f_core.tracking import resolve_model

TIMES = 10
"""Flow times per image, spread evenly over 0 to 1."""
TITLE = "Flow loss of held-out images"


class CaptionedImage(NamedTuple):
    sample_id: str
    caption: str
    image: bytes


def held_out_loss(job: EvaluateJob) -> Metric:
    """The loss by role, with its bootstrap over images; without values where it cannot be compared. Needs a running
    Ray, which computes one model after the other.
    """
    config = job.config
    if missing := not_comparable(job):
        return Metric(name=FLOW_LOSS, title=TITLE, higher_is_better=False, values={}, missing=missing)
    rows = np.flatnonzero(at_random(np.ones(job.reference.num_rows, bool), config.loss_rows, REAL_DRAWS))
    task = ray.remote(losses_of).options(num_cpus=config.score.cpus_per_actor, num_gpus=config.score.gpus_per_actor)
    found: dict[str, np.ndarray] = {}
    for each in job.compared:
        edge = min(each.job.plan.height, each.job.plan.width)
        told = each.job.plan.base_prediction
        found[each.role] = ray.get(
            task.remote(each.uri, config.reference, job.reference, rows, edge, config.generate_batch_size, told)
        )
    draws = bootstrap_counts(len(rows), config.measure.replicates, REAL_DRAWS)
    values = {
        role: {0: Estimate.of(float(each.mean()), draws @ each / len(each), len(each))} for role, each in found.items()
    }
    return Metric(name=FLOW_LOSS, title=TITLE, higher_is_better=False, values=values)


def not_comparable(job: EvaluateJob) -> str:
    """Why the models' losses cannot be compared on the reference; empty if they can."""
    if not job.config.loss_rows:
        return "loss_rows is 0"
    if job.reference.kind == GENERATIONS:
        return "the reference is a generation, not real images with captions"
    models = [each.job.model for each in job.compared]
    if len({autoencoder_fingerprint(model.base) for model in models}) > 1:
        return "the models have different autoencoders, so their latents differ"
    return ""


def read_images(uri: str, manifest: Manifest, rows: np.ndarray) -> list[CaptionedImage]:
    """Rows of an image table."""
    table = RowReader(uri, manifest, CaptionedImage._fields).read(rows)
    return [CaptionedImage(**row) for row in table.to_pylist()]


@torch.inference_mode()
def losses_of(
    uri: str, reference: str, manifest: Manifest, rows: np.ndarray, edge: int, batch: int, base_prediction: str
) -> np.ndarray:
    """Flow loss of a model on images of a table, the mean over times, float64 [rows].

    Args:
        edge: height and width in pixels to which the images' centre squares are resized.
    """
    device = reserved_device()
    model = load_model(resolve_model(uri), base_prediction=base_prediction).to(device)
    autoencoder, encoder = load_autoencoder(model.base, device=device), load_text_encoder(model.base, device=device)
    times = (torch.arange(TIMES, device=device) + 0.5) / TIMES
    found = []
    for start in range(0, len(rows), batch):
        images = read_images(reference, manifest, rows[start : start + batch])
        data, _ = autoencoder.encode(_pixels(images, edge).to(device))
        noise = keyed_normal(0, [image.sample_id for image in images], tuple(data.shape[1:]), "validation")
        given = encoder.condition([image.caption for image in images])
        if "pooled_text" in given:
            given["time_ids"] = sizes_of_new_images(len(images), edge, edge).to(device)
        losses = flow_validation_loss(model.velocity_field, data, torch.from_numpy(noise).to(device), times, **given)
        found.append(losses.double().mean(0).cpu().numpy())
    return np.concatenate(found)


def _pixels(images: Sequence[CaptionedImage], edge: int) -> torch.Tensor:
    """float32 [n, 3, edge, edge] in [-1, 1]."""
    rules = ImageRules(resolution=edge, min_side=1, max_pixels=MAX_PIXELS_LIMIT)
    pixels = np.stack([prepare_image(image.image, rules).pixels for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
