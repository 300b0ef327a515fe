"""A new autoencoder trained on the real stack; a base model's decoder is trained in test_depth_workflow.py."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from d2f_core.data.manifest import read_manifest
from d2f_core.data.table_reader import RowReader
from d2f_core.model.base import local_copy, resolve_base
from d2f_core.train.config import TrainConfig
from pipelines import train_autoencoder
from pipelines.configs import TrainAutoencoderConfig
from tests.image_tables import write_images

pytestmark = pytest.mark.timeout(600)
HOME = "s3://d2f/test-autoencoder"
TRAIN = TrainConfig(
    num_steps=4, global_batch_size=4, micro_batch_size=4, threads_per_worker=1, zero_stage=0,
    learning_rate=1e-2, log_every=2, checkpoint_every=4, evaluate_every=0,
)  # fmt: skip


@pytest.mark.usefixtures("cluster")
def test_a_new_autoencoder_gives_latents_of_unit_deviation(base: str):
    config = TrainAutoencoderConfig(
        vae_config=str(resolve_base(base).path / "vae"),
        images=write_images(f"{HOME}/images", 16),
        output=f"{HOME}/new",
        holdout_rows=0,
        train=TRAIN,
    )
    network: Any = AutoencoderKL.from_pretrained(local_copy(train_autoencoder.main(config)))
    table = RowReader(config.images, read_manifest(config.images), ("image",)).read(np.arange(16))
    with torch.no_grad():
        means = network.encode(torch.from_numpy(train_autoencoder.pictures(table)[:, 0])).latent_dist.mean
    assert float(means.std()) * network.config.scaling_factor == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("fields", [{}, {"vae_config": "here", "base": "there"}])
def test_a_new_autoencoder_or_a_base_is_asked_for_but_not_both(fields):
    with pytest.raises(ValueError, match="give one of them"):
        TrainAutoencoderConfig(images="s3://d2f/images", output="s3://d2f/vae", **fields)
