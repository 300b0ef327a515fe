"""Pixels to latents and back, with the latent scaling that the diffusion network was trained with.

| config of the autoencoder                   | scaled                       | as in                                |
|---------------------------------------------|------------------------------|--------------------------------------|
| `scaling_factor`                            | z * factor                   | StableDiffusionPipeline              |
| `scaling_factor, latents_mean, latents_std` | (z - mean) * factor / std    | StableDiffusionXLPipeline            |
| `scaling_factor, shift_factor`              | (z - shift) * factor         | StableDiffusion3Pipeline             |
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from d2f_core.file_systems import read_or_map
from d2f_core.hashing import hash_directory
from d2f_core.model.base import BaseModel, BaseModelError
from d2f_core.model.fit import diffusers_misfit, require_fit, require_safetensors
from d2f_core.model.plain_json import NotPlainError, parse
from d2f_core.model.weight_files import DIFFUSERS_NAME, variant_argument

DEFAULT_SCALING = 0.18215
"""Of an autoencoder whose config names none: diffusers' default, as in the published SD 1.5 and SD 2.1."""


@dataclass(frozen=True, kw_only=True)
class LatentScale:
    """Scales latents [..., channels, height, width] by a factor, a shift and a deviation."""

    factor: float = DEFAULT_SCALING
    mean: tuple[float, ...] = ()
    """Subtracted before, one value or one per channel; empty: nothing is."""
    std: tuple[float, ...] = ()
    """Divided by, one value per channel; empty: by 1."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "LatentScale":
        """The scaling that an AutoencoderKL's config asks for.

        Raises:
            ValueError: a value that cannot be; says the value, the rule and the fix.
        """
        factor = config.get("scaling_factor", DEFAULT_SCALING)
        if not _is_number(factor) or factor <= 0:
            raise ValueError(f"scaling_factor={factor!r}, which must be above 0. Give that of the original model.")
        shift: Any = config.get("shift_factor")
        mean: Any = config.get("latents_mean")
        std: Any = config.get("latents_std")
        if shift is not None and not _is_number(shift):
            raise ValueError(f"shift_factor={shift!r}, which must be a number. Give that of the original model.")
        if mean is std is None:
            return cls(factor=float(factor), mean=(float(shift),) if shift else ())
        channels = int(config.get("latent_channels", 4))
        if shift or not all(_is_list(values, channels) for values in (mean, std)) or min(std) <= 0:
            raise ValueError(
                f"latents_mean={mean!r}, latents_std={std!r} and shift_factor={shift!r}: mean and deviation must come "
                f"together with {channels} finite numbers each, deviations above 0, and without a shift_factor. Copy "
                "the config of the original model."
            )
        return cls(factor=float(factor), mean=tuple(map(float, mean)), std=tuple(map(float, std)))

    @property
    def more(self) -> tuple[object, ...]:
        """What is beside the factor; empty when there is nothing."""
        return (self.mean, self.std) if self.mean or self.std else ()

    def scaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's own latents as the network reads them."""
        centred = latents - _per_channel(self.mean, latents) if self.mean else latents
        return self.scaled_deviation(centred)

    def scaled_deviation(self, std: Tensor) -> Tensor:
        """Standard deviations of the autoencoder's own latents as those of scaled ones."""
        made = std * self.factor
        return made / _per_channel(self.std, std) if self.std else made

    def unscaled(self, latents: Tensor) -> Tensor:
        """The network's latents as the autoencoder decodes them."""
        made = (latents * _per_channel(self.std, latents) if self.std else latents) / self.factor
        return made + _per_channel(self.mean, latents) if self.mean else made


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(values: Any, length: int) -> bool:
    return isinstance(values, list | tuple) and len(values) == length and all(map(_is_number, values))


@dataclass(frozen=True)
class Autoencoder:
    """An AutoencoderKL in evaluation mode. Latents are scaled to about unit variance, as the UNet expects them, by its
    config's `scaling_factor`, `shift_factor`, `latents_mean` and `latents_std`.
    """

    network: AutoencoderKL
    fingerprint: str
    """sha256 of the weights, the config and the scaling; latents with another fingerprint are not compatible."""

    @property
    def scaling_factor(self) -> float:
        return self.scale.factor

    @cached_property
    def scale(self) -> LatentScale:
        return LatentScale.from_config(cast(Any, self.network.config))

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, [batch, C, H/f, W/f], of pixels [batch, 3, H, W] in [-1,
        1], where f is `downsampling`.
        """
        posterior = cast(Any, self.network.encode(pixels.to(self.network.dtype))).latent_dist
        return self.scale.scaled(posterior.mean.float()), self.scale.scaled_deviation(posterior.std.float())

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [batch, 3, H, W] in [-1, 1] of scaled latents [batch, C, H/f, W/f]."""
        unscaled = self.scale.unscaled(latents).to(self.network.dtype)
        return cast(Any, self.network.decode(cast(Any, unscaled))).sample.float().clamp(-1, 1)


def latent_scale(base: BaseModel) -> LatentScale:
    """How a base model's latents are scaled, by its vae/config.json.

    Raises:
        BaseModelError: there is none, or it names a scaling that cannot be.
    """
    try:
        return LatentScale.from_config(_config(base))
    except ValueError as error:
        raise BaseModelError(f"{base.uri!r}: vae/config.json has {error}") from None


def _config(base: BaseModel) -> dict[str, Any]:
    file = base.path / "vae/config.json"
    if not file.is_file():
        raise BaseModelError(f"{base.uri!r} has no vae/config.json. Copy the vae directory of the original model.")
    try:
        return parse(file.read_bytes())
    except NotPlainError as error:
        raise BaseModelError(f"{base.uri!r}: vae/config.json {error}") from None


def autoencoder_fingerprint(base: BaseModel) -> str:
    """The fingerprint of a base model's autoencoder, without loading it.

    Raises:
        BaseModelError: the base model has no autoencoder.
        UnreachableError: S3, where the files of a described base lie, stays away.
    """
    scaling, more = _config(base).get("scaling_factor"), latent_scale(base).more
    # Tables that were made while a shift was ignored must not be taken for those that have it.
    parts = (hash_directory(base.path / "vae", sha256=base.files.sha256), scaling, *more)
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


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
        directory,
        torch_dtype=dtype,
        use_safetensors=True,
        variant=variant_argument(directory, DIFFUSERS_NAME),
        **read_or_map(directory),
    )
    return Autoencoder(network.to(device).eval().requires_grad_(False), fingerprint)


def check_autoencoder(base: BaseModel) -> None:
    """Compare the autoencoder's config with the headers of its files.

    Raises:
        BaseModelError: the base model has no `vae` directory with safetensors, or they are damaged or of another
            network.
    """
    directory = base.path / "vae"
    require_safetensors(base, "vae", "diffusers.AutoencoderKL")
    latent_scale(base)
    with torch.device("meta"):
        network = cast(Any, AutoencoderKL).from_config(AutoencoderKL.load_config(directory))
    require_fit(base, "vae", lambda: diffusers_misfit(network, directory))
