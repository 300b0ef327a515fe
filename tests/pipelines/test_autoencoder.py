"""A new autoencoder; a base model's decoder is trained in test_depth_workflow.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from d2f_core.data.manifest import read_manifest
from d2f_core.data.table_reader import RowReader
from d2f_core.model.base import local_copy, resolve_base
from d2f_core.train.checkpoint import list_checkpoints
from d2f_core.train.checkpoint_writer import CheckpointWriter
from d2f_core.train.config import TrainConfig
from d2f_core.train.retention_rules import Retention
from pipelines import autoencoder_task, train_autoencoder
from pipelines.configs import TrainAutoencoderConfig
from tests.image_tables import write_images
from tests.slow import slow

pytestmark = pytest.mark.timeout(600)
HOME = "s3://d2f/test-autoencoder"
TRAIN = TrainConfig(
    num_steps=4, global_batch_size=4, micro_batch_size=4, threads_per_worker=1, zero_stage=0,
    learning_rate=1e-2, log_every=2, checkpoint_every=4, evaluate_every=0,
)  # fmt: skip


def configured(base: str, place: str) -> TrainAutoencoderConfig:
    return TrainAutoencoderConfig(
        vae_config=str(resolve_base(base).path / "vae"),
        images=write_images(f"{place}/images", 16),
        output=f"{place}/new",
        holdout_rows=0,
        train=TRAIN,
    )


def check_deviation(config: TrainAutoencoderConfig, result: str) -> None:
    network: Any = AutoencoderKL.from_pretrained(local_copy(result))
    table = RowReader(config.images, read_manifest(config.images), ("image",)).read(np.arange(16))
    with torch.no_grad():
        means = network.encode(torch.from_numpy(autoencoder_task.pictures(table)[:, 0])).latent_dist.mean
    assert float(means.std()) * network.config.scaling_factor == pytest.approx(1, abs=0.01)


def test_a_new_autoencoder_gives_latents_of_unit_deviation(base: str, tmp_path: Path):
    """Of a checkpoint as its training would leave it."""
    config = configured(base, str(tmp_path))
    module = autoencoder_task.build_task(config, autoencoder_task.begins_with(config), "cpu").module
    weights = {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}
    identity = train_autoencoder.check(config).identity
    writer = CheckpointWriter(config.output, "a", 0, 1, Retention())
    writer.save(1, samples=4, identity=identity, tensors={"weights": weights, "ema": weights}, state={})
    writer.wait()
    check_deviation(config, autoencoder_task.export(config, list_checkpoints(config.output)[-1]))


@slow("25 s: the decoder of a base is trained in test_depth_workflow.py, and the export stays")
@pytest.mark.usefixtures("cluster")
def test_a_new_autoencoder_is_trained_and_exported(base: str):
    config = configured(base, HOME)
    check_deviation(config, train_autoencoder.main(config))


@pytest.mark.parametrize("fields", [{}, {"vae_config": "here", "base": "there"}])
def test_a_new_autoencoder_or_a_base_is_asked_for_but_not_both(fields):
    with pytest.raises(ValueError, match="give one of them"):
        TrainAutoencoderConfig(images="s3://d2f/images", output="s3://d2f/vae", **fields)
