"""A diffusion network as a teacher: read at one of its blocks, at given levels of noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from d2f_core.correspondence.preparation import Preparation
from d2f_core.correspondence.teachers import Picture, TeacherError
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import BaseModel
from d2f_core.model.denoiser import load_unet, unet_on_meta
from d2f_core.model.text_encoder import load_text_encoder
from d2f_core.objective.schedule import FlowTimes
from d2f_core.randomness import keyed_normal

PromptMode = Literal["empty", "generic", "category", "caption"]
GENERIC_PROMPT = "a photo"


@dataclass(frozen=True, kw_only=True)
class DiffusionReading:
    """Where and when a diffusion network is read."""

    block: str = "up_blocks.1"
    """Module path in the UNet."""
    timesteps: tuple[int, ...] = (261,)
    """Levels of noise at which it is read; the features are averaged over them."""
    prompt: PromptMode = "empty"
    """What the network is told. `category` and `caption` use labels, so they are part of what a teacher knows."""
    micro_conditioning: bool = False
    """Whether SDXL is told the image's size. The published teacher of arXiv:2412.03512 leaves it out."""
    seed: int = 0
    """Of the noise, with the image's key and the timestep."""


class DiffusionTeacher:
    """A UNet's features of noisy latents, at one of its blocks; what follows the block is not computed.

    Source: DIFT, Tang et al., 2023, arXiv:2306.03881. The noise is a function of (seed, image, timestep), where the
    published code draws it anew on every run, and the image is encoded once for all timesteps, to the mean of its
    latents.
    """

    def __init__(
        self,
        name: str,
        base: BaseModel,
        preparation: Preparation,
        reading: DiffusionReading,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load it.

        Args:
            preparation: normalised to [-1, 1] ("half"), as autoencoders take images.
            dtype: of the UNet; the autoencoder computes in float32, for SDXL's overflows in float16.

        Raises:
            BaseModelError: the base is no whole Stable Diffusion checkpoint.
            TeacherError: the UNet has no such block or timestep, or the preparation is for another kind of network.
        """
        if preparation.normalisation != "half":
            raise TeacherError(
                f"normalisation={preparation.normalisation!r} of {name!r} is not what autoencoders take. Use 'half'."
            )
        unet = cast(Any, load_unet(base, probe=False)).to(device=device, dtype=dtype).eval().requires_grad_(False)
        _require_block(unet, base, reading.block)
        self._pooled = unet.config.get("addition_embed_type") is not None
        if self._pooled and not reading.micro_conditioning:
            unet.register_to_config(addition_embed_type=None)
        levels = noise_levels(base)
        if not reading.timesteps or not all(0 <= step < len(levels) for step in reading.timesteps):
            raise TeacherError(
                f"timesteps={reading.timesteps} must be at least one, from 0 to {len(levels) - 1}. Mend them."
            )
        self.name, self._preparation, self._reading, self._device = name, preparation, reading, device
        self._unet, self._levels = unet, levels
        self._autoencoder = load_autoencoder(base, device=device)
        self._text = load_text_encoder(base, device=device)
        blank = Picture(pixels=np.zeros((preparation.size, preparation.size, 3), np.uint8))
        probe = self._maps([blank])
        self.grid, self.channels = (probe.shape[2], probe.shape[3]), probe.shape[1]

    def features(self, pictures: Sequence[Picture]) -> Tensor:
        return self._maps(pictures).flatten(2).transpose(1, 2)

    @torch.inference_mode()
    def _maps(self, pictures: Sequence[Picture]) -> Tensor:
        """The block's output averaged over the timesteps, [pictures, channels, height, width]."""
        steps = self._reading.timesteps
        pixels = self._preparation.pixels([picture.pixels for picture in pictures]).to(self._device)
        latents = self._autoencoder.encode(pixels)[0].repeat_interleave(len(steps), dim=0)
        keys = [f"{picture.key}/{step}" for picture in pictures for step in steps]
        noise = torch.from_numpy(keyed_normal(self._reading.seed, keys, tuple(latents.shape[1:]))).to(latents)
        times = torch.tensor(steps).repeat(len(pictures))
        level = self._levels[times].to(latents)[:, None, None, None]
        noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
        found = read_block(
            self._unet,
            self._reading.block,
            noisy.to(self._unet.dtype),
            times.to(self._device),
            **self._condition(pictures),
        )
        return found.float().unflatten(0, (len(pictures), len(steps))).mean(dim=1).cpu()

    def _condition(self, pictures: Sequence[Picture]) -> dict[str, Any]:
        """The UNet's further arguments, one per picture and timestep."""
        prompts = [prompt_of(picture, self._reading.prompt) for picture in pictures]
        times = len(self._reading.timesteps)
        told = {
            name: value.repeat_interleave(times, dim=0).to(device=self._device, dtype=self._unet.dtype)
            for name, value in self._text.condition(prompts).items()
        }
        condition: dict[str, Any] = {"encoder_hidden_states": told["text_states"]}
        if self._pooled and self._reading.micro_conditioning:
            size = self._preparation.size
            ids = torch.tensor([size, size, 0, 0, size, size], dtype=torch.float32, device=self._device)
            condition["added_cond_kwargs"] = {
                "text_embeds": told["pooled_text"],
                "time_ids": ids.expand(len(told["pooled_text"]), -1),
            }
        return condition


def noise_levels(base: BaseModel) -> Tensor:
    """The noise levels [T] whose indices a teacher's timesteps are; raises TeacherError for a flow model."""
    schedule = base.schedule
    if isinstance(schedule, FlowTimes):
        raise TeacherError(
            f"{base.uri!r} is a flow model, and timesteps of teachers are those of a diffusion model's noise. Give the "
            "diffusion model that it was made from."
        )
    return schedule.alphas_cumprod


def described_shape(base: BaseModel, block: str, size: int) -> tuple[int, int, int]:
    """Height, width and channels of a block's output for inputs of `size` pixels, without the network's weights.

    Raises:
        TeacherError: the UNet has no such block, or is a flow model's.
    """
    noise_levels(base)
    unet: Any = unet_on_meta(base.path / "unet")
    _require_block(unet, base, block)
    unet.register_to_config(addition_embed_type=None)
    side = size // base.pixels_per_latent
    width = unet.config.cross_attention_dim
    with torch.device("meta"):
        latents = torch.empty(1, unet.config.in_channels, side, side)
        found = read_block(unet, block, latents, torch.zeros(1), encoder_hidden_states=torch.empty(1, 77, width))
    return found.shape[2], found.shape[3], found.shape[1]


def _require_block(unet: nn.Module, base: BaseModel, block: str) -> None:
    if block not in dict(unet.named_modules()):
        raise TeacherError(f"the UNet of {base.uri!r} has no module {block!r}. Use a path such as 'up_blocks.1'.")


def prompt_of(picture: Picture, mode: PromptMode) -> str:
    """What a diffusion teacher is told of an image.

    Raises:
        TeacherError: the image has no category or caption, and the mode asks for it.
    """
    if mode == "empty":
        return ""
    if mode == "generic":
        return GENERIC_PROMPT
    word = picture.category if mode == "category" else picture.caption
    if not word:
        raise TeacherError(f"image {picture.key!r} has no {mode}, which prompt={mode!r} needs. Use prompt='generic'.")
    return f"a photo of a {word}" if mode == "category" else word


class _ReachedError(Exception):
    """Carries a block's output out of the network's forward pass."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


def read_block(network: nn.Module, block: str, *args: Any, **kwargs: Any) -> Tensor:
    """The output of one module of a network, called with these arguments; what follows the module is not computed."""

    def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
        raise _ReachedError(output[0] if isinstance(output, tuple) else getattr(output, "sample", output))

    hook = network.get_submodule(block).register_forward_hook(leave)
    try:
        network(*args, **kwargs)
    except _ReachedError as reached:
        return reached.output
    finally:
        hook.remove()
    raise TeacherError(f"module {block!r} is not computed in a forward pass. Name one that is.")
