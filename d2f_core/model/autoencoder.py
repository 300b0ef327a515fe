"""Pixels to latents and back, with the latent scaling that the diffusion network was trained with."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from d2f_core.file_systems import read_or_map
from d2f_core.hashing import hash_directory
from d2f_core.model.base import BaseModel, BaseModelError
from d2f_core.model.fit import diffusers_misfit, require_fit


@dataclass(frozen=True)
class Autoencoder:
    """An AutoencoderKL in evaluation mode. Latents are scaled to about unit variance, as the UNet expects them."""

    network: AutoencoderKL
    fingerprint: str
    """sha256 of the weights, the config and the scaling; latents with another fingerprint are not compatible."""

    @property
    def scaling_factor(self) -> float:
        return float(cast(Any, self.network.config).scaling_factor)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, [batch, C, H/f, W/f], of pixels [batch, 3, H, W] in [-1,
        1], where f is `downsampling`.
        """
        posterior = cast(Any, self.network.encode(pixels.to(self.network.dtype))).latent_dist
        return posterior.mean.float() * self.scaling_factor, posterior.std.float() * self.scaling_factor

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [batch, 3, H, W] in [-1, 1] of scaled latents [batch, C, H/f, W/f]."""
        unscaled = (latents / self.scaling_factor).to(self.network.dtype)
        return cast(Any, self.network.decode(cast(Any, unscaled))).sample.float().clamp(-1, 1)


def autoencoder_fingerprint(base: BaseModel) -> str:
    """The fingerprint of a base model's autoencoder, without loading it.

    Raises:
        BaseModelError: the base model has no autoencoder.
        UnreachableError: S3, where the files of a described base lie, stays away.
    """
    directory = base.path / "vae"
    if not (directory / "config.json").is_file():
        raise BaseModelError(f"{base.uri!r} has no vae/config.json. Copy the vae directory of the original model.")
    scaling = json.loads((directory / "config.json").read_text()).get("scaling_factor")
    return hashlib.sha256(f"{hash_directory(directory, sha256=base.files.sha256)} {scaling}".encode()).hexdigest()


def load_autoencoder(
    base: BaseModel, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """The base model's autoencoder, frozen.

    Raises:
        BaseModelError: see `check_autoencoder`.
    """
    fingerprint = autoencoder_fingerprint(base)
    check_autoencoder(base)
    directory = base.files.require_whole() / "vae"
    network: Any = AutoencoderKL.from_pretrained(
        directory, torch_dtype=dtype, use_safetensors=True, **read_or_map(directory)
    )
    return Autoencoder(network.to(device).eval().requires_grad_(False), fingerprint)


def check_autoencoder(base: BaseModel) -> None:
    """Compare the autoencoder's config with the headers of its files.

    Raises:
        BaseModelError: the base model has no `vae` directory with safetensors, or they are damaged or of another
            network.
    """
    directory = base.path / "vae"
    if not any(directory.glob("*.safetensors")):
        raise BaseModelError(f"{base.uri!r} has no safetensors in vae/. Train or convert the autoencoder first.")
    with torch.device("meta"):
        network = cast(Any, AutoencoderKL).from_config(AutoencoderKL.load_config(directory))
    require_fit(base, "vae", lambda: diffusers_misfit(network, directory))
