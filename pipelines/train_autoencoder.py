"""Train an autoencoder on an image table: `python -m pipelines.train_autoencoder emoji`. The same command again
resumes.

At the end `OUTPUT/vae/` is a diffusers AutoencoderKL with its scaling factor, in fp16.
"""

import functools
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from d2f_core import storage
from d2f_core.data.manifest import read_manifest
from d2f_core.data.table_reader import RowReader
from d2f_core.model.autoencoder_training import AutoencoderTask, TrainableAutoencoder, decode_pixels, latent_scaling
from d2f_core.model.base import local_copy
from d2f_core.model.text_to_image import image_grid
from d2f_core.train.checkpoint import Checkpoint, read_tensors
from d2f_core.train.launch import run_training
from d2f_core.train.task import Evaluation, Task
from pipelines.cli import run_job, to_yaml
from pipelines.configs import TrainAutoencoderConfig

logger = logging.getLogger(__name__)

COLUMNS = ("image",)
SHOWN = 12


def vae_config(config: TrainAutoencoderConfig) -> dict[str, Any]:
    return json.loads((local_copy(config.vae_config) / "config.json").read_text())


def arrays(table: pa.Table) -> dict[str, Any]:
    return {name: table.column(name).to_pylist() for name in table.column_names}


def build_task(config: TrainAutoencoderConfig, device: str) -> Task:
    """What a worker trains; called once on each."""
    task = AutoencoderTask(vae_config(config), config.loss, seed=config.train.seed, device=device)
    return Task(
        module=task.module,
        to_batch=lambda table: task.to_batch(arrays(table)),
        loss_fn=task.loss,
        evaluate=functools.partial(evaluate, config, task),
        make_grid=functools.partial(image_grid, columns=SHOWN),
    )


def evaluate(config: TrainAutoencoderConfig, task: AutoencoderTask) -> Evaluation:
    """The error on the held-out images, and some of them beside their reconstructions."""
    manifest = read_manifest(config.images)
    held = config.plan(manifest, COLUMNS).sources[0].order.holdout()
    if not len(held):
        return Evaluation()
    images = RowReader(config.images, manifest, COLUMNS).read(held).column("image").to_pylist()
    error, pairs = task.reconstruct(task.module, images)
    return Evaluation(metrics={"validation_absolute_error": error / len(images)}, images=pairs[:SHOWN])


def export(config: TrainAutoencoderConfig, last: Checkpoint) -> None:
    """Write `OUTPUT/vae/` from the averaged weights of a checkpoint."""
    module = TrainableAutoencoder(vae_config(config), seed=0)
    kind = "ema" if config.train.ema.decay else "weights"
    module.load_state_dict(read_tensors(last, kind))
    table = read_manifest(config.images)
    reader = RowReader(config.images, table, COLUMNS)
    order = config.plan(table, COLUMNS).sources[0].order
    rows = order.at(np.arange(min(256, order.num_samples)))[1]
    pixels = torch.from_numpy(decode_pixels(reader.read(rows).column("image").to_pylist()))
    network = module.autoencoder.eval()
    network.register_to_config(scaling_factor=round(latent_scaling(network, pixels), 5))
    with tempfile.TemporaryDirectory() as directory:
        network.half().save_pretrained(directory, safe_serialization=True)
        storage.upload_tree(Path(directory), storage.join(config.output, "vae"))
    logger.info("wrote %s", storage.join(config.output, "vae"))


def main(config: TrainAutoencoderConfig) -> None:
    import ray

    storage.check_reachable(config.output, write=True)
    manifest = read_manifest(config.images)
    ray.init(ignore_reinit_error=True)
    storage.write_bytes(storage.join(config.output, "config.yaml"), to_yaml(config).encode())
    last = run_training(
        config=config.train,
        build_task=functools.partial(build_task, config),
        plan=config.plan(manifest, COLUMNS),
        output=config.output,
        identity=config.identity(vae_config(config), manifest),
    )
    export(config, last)


if __name__ == "__main__":
    from pipelines.recipes import AUTOENCODER

    run_job("train_autoencoder", AUTOENCODER, main)
