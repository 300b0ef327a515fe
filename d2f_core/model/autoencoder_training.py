"""Train an AutoencoderKL, or only its decoder: pictures -> batch -> loss."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from d2f_core.model.artifact import to_uint8
from d2f_core.model.config import AutoencoderLossConfig
from d2f_core.randomness import keyed_normal


class TrainableAutoencoder(nn.Module):
    """An AutoencoderKL whose forward takes its noise as an argument, and also returns what the KL term needs.

    Args:
        decoder_only: freeze the encoder, so that existing latents, and networks trained on them, stay valid.
    """

    def __init__(self, autoencoder: AutoencoderKL, *, decoder_only: bool = False) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        if decoder_only:
            for part in (autoencoder.encoder, autoencoder.quant_conv):
                if part is not None:
                    part.requires_grad_(False)

    def forward(self, pixels: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction [batch, 3, H, W], and mean and log-variance [batch, C, h, w] of the latents, in float32.

        The networks compute in the dtype of their weights.
        """
        dtype = self.autoencoder.dtype
        posterior = cast(Any, self.autoencoder.encode(pixels.to(dtype))).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        latents = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return cast(Any, self.autoencoder.decode(latents.to(dtype))).sample.float(), mean, log_variance


def new_autoencoder(config: Mapping[str, Any], seed: int) -> AutoencoderKL:
    """An AutoencoderKL with the given config and weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(AutoencoderKL, AutoencoderKL.from_config(dict(config)))


def decode_pixels(encoded: Sequence[bytes]) -> np.ndarray:
    """Float32 [len(encoded), 3, H, W] in [-1, 1] from encoded images of one size."""
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float32) for data in encoded]
    return np.stack(images).transpose(0, 3, 1, 2) / 127.5 - 1


class AutoencoderTask:
    """The task on one worker's device.

    A row has one picture or several (an image, and its depth as a picture); its loss is the mean over them.
    """

    def __init__(self, module: TrainableAutoencoder, config: AutoencoderLossConfig, *, seed: int, device: str) -> None:
        vae: Any = module.autoencoder.config
        self.module = module
        self._channels, self._factor = int(vae.latent_channels), 2 ** (len(vae.block_out_channels) - 1)
        self._config, self._seed, self._device = config, seed, device

    def to_batch(self, pictures: np.ndarray, epochs: Sequence[int], rows: Sequence[int]) -> dict[str, Tensor]:
        """Tensors for `loss` from pictures, float32 [batch, pictures, 3, H, W] in [-1, 1], and each row's epoch and
        number.
        """
        batch, each, _, height, width = pictures.shape
        keys = [  # a row's only picture has a key without an index, as in earlier runs
            f"{epoch}/{row}/{number}" if number else f"{epoch}/{row}"
            for epoch, row in zip(epochs, rows, strict=True)
            for number in range(each)
        ]
        latent = (self._channels, height // self._factor, width // self._factor)
        noise = keyed_normal(self._seed, keys, latent, "latent").reshape(batch, each, *latent)
        return {
            "pixels": torch.from_numpy(pictures).to(self._device),
            "noise": torch.from_numpy(noise).to(self._device),
        }

    def loss(self, network: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """Loss per row [batch]."""
        pixels = batch["pixels"].flatten(0, 1)
        reconstruction, mean, log_variance = network(pixels, batch["noise"].flatten(0, 1))
        error = reconstruction - pixels
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        loss = (
            error.abs().flatten(1).mean(1)
            + self._config.square_weight * error.square().flatten(1).mean(1)
            + self._config.kl_weight * kl.flatten(1).mean(1)
        )
        return loss.unflatten(0, batch["pixels"].shape[:2]).mean(1)

    def reconstruct(self, network: Callable[..., Any], pictures: np.ndarray) -> tuple[Tensor, list[Image.Image]]:
        """Mean absolute error (in [0, 1] pixels) [batch, pictures], and each picture beside its reconstruction."""
        pixels = torch.from_numpy(pictures).to(self._device)
        reconstruction = network(pixels.flatten(0, 1), None)[0].unflatten(0, pixels.shape[:2])
        error = (reconstruction - pixels).abs().flatten(2).mean(2) / 2
        pairs = torch.stack([pixels, reconstruction], 2).flatten(0, 2)
        return error, [Image.fromarray(image) for image in to_uint8(pairs).numpy()]


@torch.no_grad()
def latent_scaling(network: AutoencoderKL, pixels: Tensor) -> float:
    """The scaling factor that gives latents of `pixels` unit variance."""
    return 1 / float(cast(Any, network.encode(pixels)).latent_dist.mean.std())
