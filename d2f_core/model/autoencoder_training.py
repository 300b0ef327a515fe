"""Train an AutoencoderKL from random weights: rows of an image table -> batch -> loss."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from d2f_core.model.artifact import to_uint8
from d2f_core.randomness import keyed_normal


@dataclass(frozen=True, kw_only=True)
class AutoencoderLossConfig:
    square_weight: float = 1.0
    """Weight of the mean squared error beside the mean absolute error."""
    kl_weight: float = 3e-4
    """Weight of the mean KL divergence per latent entry; keeps latents smooth enough to be generated."""


class TrainableAutoencoder(nn.Module):
    """An AutoencoderKL whose forward also gives what the KL term needs, and takes its noise from outside."""

    def __init__(self, config: Mapping[str, Any], seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.autoencoder = cast(AutoencoderKL, AutoencoderKL.from_config(dict(config)))

    def forward(self, pixels: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction [batch, 3, H, W], and mean and log-variance [batch, C, h, w] of the latents."""
        posterior = cast(Any, self.autoencoder.encode(pixels)).latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return cast(Any, self.autoencoder.decode(latents)).sample, posterior.mean, posterior.logvar


def decode_pixels(encoded: Sequence[bytes]) -> np.ndarray:
    """Float32 [len(encoded), 3, H, W] in [-1, 1] of equally large images."""
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float32) for data in encoded]
    return np.stack(images).transpose(0, 3, 1, 2) / 127.5 - 1


class AutoencoderTask:
    """The task on one worker's device."""

    def __init__(self, vae_config: Mapping[str, Any], config: AutoencoderLossConfig, *, seed: int, device: str) -> None:
        self.module = TrainableAutoencoder(vae_config, seed)
        self._channels = int(vae_config["latent_channels"])
        self._factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        self._config, self._seed, self._device = config, seed, device

    def to_batch(self, arrays: Mapping[str, Any]) -> dict[str, Tensor]:
        """Columns of an image table, with `epoch` and `row`, -> tensors."""
        pixels = decode_pixels(arrays["image"])
        keys = [f"{epoch}/{row}" for epoch, row in zip(arrays["epoch"], arrays["row"], strict=True)]
        shape = (self._channels, pixels.shape[2] // self._factor, pixels.shape[3] // self._factor)
        return {
            "pixels": torch.from_numpy(pixels).to(self._device),
            "noise": torch.from_numpy(keyed_normal(self._seed, keys, shape, "latent")).to(self._device),
        }

    def loss(self, network: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """Loss per sample [batch]."""
        pixels = batch["pixels"]
        reconstruction, mean, log_variance = network(pixels, batch["noise"])
        error = reconstruction - pixels
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return (
            error.abs().flatten(1).mean(1)
            + self._config.square_weight * error.square().flatten(1).mean(1)
            + self._config.kl_weight * kl.flatten(1).mean(1)
        )

    def reconstruct(self, network: Callable[..., Any], encoded: Sequence[bytes]) -> tuple[float, list[Image.Image]]:
        """Summed mean absolute error (in [0, 1] pixels) over images, and each image beside its reconstruction."""
        pixels = torch.from_numpy(decode_pixels(encoded)).to(self._device)
        reconstruction, *_ = network(pixels, None)
        error = float((reconstruction - pixels).abs().flatten(1).mean(1).sum()) / 2
        pairs = torch.stack([pixels, reconstruction], 1).flatten(0, 1)
        return error, [Image.fromarray(image) for image in to_uint8(pairs).numpy()]


@torch.no_grad()
def latent_scaling(network: AutoencoderKL, pixels: Tensor) -> float:
    """The scaling factor that gives latents of `pixels` unit variance."""
    return 1 / float(cast(Any, network.encode(pixels)).latent_dist.mean.std())
