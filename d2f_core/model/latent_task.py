"""A task on latents: rows -> batch -> loss, and the validation loss. Each task defines its network's conditions.

Every random number of a sample is keyed by (seed, epoch, row): no worker, restart or batch size changes it.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn

from d2f_core.model.artifact import (
    DESCRIPTION,
    DescribedModel,
    TrainedModel,
    describe_model,
    load_model,
    read_description,
)
from d2f_core.model.base import BaseModel, BaseModelError, described_copy, local_copy
from d2f_core.model.caption_cache import CaptionCache
from d2f_core.model.caption_rules import read_rules
from d2f_core.model.config import ModelConfig, PreviewConfig, SamplingDefaults
from d2f_core.model.denoiser import as_denoiser, check_unet, extend_input_channels, load_unet, unet_on_meta
from d2f_core.model.image_sizes import SIZE_COLUMNS, sizes_of_rows
from d2f_core.model.lora import add_lora, check_adapter, set_adapter
from d2f_core.model.text_encoder import describe_text_encoder, load_text_encoder
from d2f_core.objective.alignment import VelocityField
from d2f_core.objective.loss import LOSSES, flow_validation_loss
from d2f_core.objective.path import resolution_shift
from d2f_core.randomness import keyed_normal, keyed_uniform, sample_keys

VALIDATION_TIMES = 10


def training_loss(config: ModelConfig, field_: VelocityField, batch: Mapping[str, Tensor], base_pixels: int) -> Tensor:
    """Loss per sample [batch]; `base_pixels` is the number of latent pixels at the base's own size."""
    shift = resolution_shift(batch["data"][0, 0].numel(), base_pixels) if config.shift_by_resolution else 1.0
    options: dict[str, Any] = {"times": replace(config.times, shift=shift * config.times.shift)}
    if config.objective == "diffusion":
        options = {"min_snr_gamma": config.min_snr_gamma}
    elif config.objective == "flow_matching":
        options["target"] = config.naive_target
    return LOSSES[config.objective](field_, **batch, **options)


def joined_channels(base: BaseModel, config: ModelConfig) -> int:
    """Number of input channels added to the base's own: the channels of an image's latents, or 0."""
    return base.latent_shape(*base.default_size)[0] if config.joins_latents else 0


def build_network(base: BaseModel, config: ModelConfig, seed: int) -> nn.Module:
    """The module to train; only parameters that the method trains have `requires_grad`."""
    network = _made_trainable(load_unet(base, from_scratch=config.from_scratch, seed=seed), base, config, seed)
    if config.start:
        _start_from(network, base, config)
    return network


def empty_network(base: BaseModel, config: ModelConfig) -> nn.Module:
    """The network of `build_network` on torch's meta device: names, shapes and configs without weights."""
    with torch.device("meta"):
        return _made_trainable(unet_on_meta(base.path / "unet"), base, config, seed=0)


def _made_trainable(unet: UNet2DConditionModel, base: BaseModel, config: ModelConfig, seed: int) -> nn.Module:
    if extra := joined_channels(base, config):
        extend_input_channels(unet, extra)
    return add_lora(unet, config.lora, seed=seed) if config.method == "lora" else unet.requires_grad_(True)


def check_objective(base: BaseModel, config: ModelConfig) -> None:
    """Refuse (BaseModelError) a loss that a flow base cannot be trained with."""
    published = config.objective == "flow_matching" and config.naive_target != "noise_minus_data"
    if base.is_flow and (config.objective == "diffusion" or published):
        wanted = f"naive_target={config.naive_target!r}" if published else f"objective={config.objective!r}"
        raise BaseModelError(
            f"{base.uri!r} is a flow model (prediction_type {base.prediction_type!r}), which puts out noise - data; "
            f"{wanted} would train it to put out something else. Use objective='diff2flow', which is plain flow "
            "matching here."
        )


def _put_out(base: BaseModel, objective: str, naive_target: str) -> str:
    """What a network puts out that was trained on a base."""
    if base.is_flow:
        return "noise_minus_data"
    return naive_target if objective == "flow_matching" else base.prediction_type


def check_networks(base: BaseModel, config: ModelConfig) -> None:
    """Build the networks of a training without weights, and compare those of the base with the headers of its files.

    Raises:
        BaseModelError: the base cannot be trained with this objective, a network's files are missing, damaged or of
            another network, or text encoder and UNet do not belong together.
        AdapterError: the LoRA settings fit no layer of the network.
        ConditionError: the UNet needs a condition that is not known here.
    """
    check_objective(base, config)
    if not config.from_scratch:
        check_unet(base)
    as_denoiser(empty_network(base, config))
    describe_text_encoder(base.read_captions(config.captions))


def check_start(base: BaseModel, config: ModelConfig) -> DescribedModel:
    """Describe the trained model in the directory `config.start`, and check that the configured training can start from
    it; no weights are loaded.

    Raises:
        ValueError: it was trained on another base, for another task, by another method, with other LoRA settings, or to
            put out something else.
    """
    trained = describe_model(config.start)  # checks files and hashes
    if not base.has_hash(trained.base.content_hash) and trained.base.read_hash != base.read_hash:
        raise ValueError(
            f"start={config.start!r} was trained on a base with the hash {trained.base.content_hash}; base="
            f"{base.uri!r} has {base.content_hash}. Give that model's base."
        )
    if trained.task != config.task:
        raise ValueError(f"start={config.start!r} was trained for task={trained.task!r}, not {config.task!r}.")
    if trained.method != config.method:
        raise ValueError(
            f"start={config.start!r} was trained by method={trained.method!r}, not {config.method!r}. Use the same."
        )
    has, wants = (_put_out(base, each.objective, each.naive_target) for each in (trained, config))
    if has != wants:
        raise ValueError(
            f"start={config.start!r} puts out {has} (objective={trained.objective!r}), which objective="
            f"{config.objective!r} would read as {wants}. Use the objective and naive_target that it was trained with."
        )
    if trained.method == "lora":
        check_adapter(cast(PeftModel, empty_network(base, config)), described_copy(config.start).path / "adapter")
    return trained


def check_start_captions(directory: Path, config: ModelConfig) -> None:
    """Refuse (ValueError) a start that reads captions by other rules than the training.

    Args:
        directory: the trained model's, on this machine.
    """
    if (directory / DESCRIPTION).is_file() and (rules := read_rules(read_description(directory))) != config.captions:
        raise ValueError(
            f"start={config.start!r} reads captions by {rules}, and this training by {config.captions}. Train on "
            "tables that were made with the start's rules, or give them as model.captions."
        )


def _start_from(network: nn.Module, base: BaseModel, config: ModelConfig) -> None:
    """Set the trainable parameters to the values of the trained model in `config.start`."""
    directory = local_copy(config.start)  # first, so that the check reads this copy's contents
    check_start(base, config)
    check_start_captions(directory, config)
    if config.method == "lora":
        set_adapter(cast(PeftModel, network), directory / "adapter")
    else:
        network.load_state_dict(load_model(config.start).network.state_dict())


def flipped_rows(arrays: Mapping[str, Any], flipped: np.ndarray) -> dict[str, Any]:
    """Columns of a latent table that holds mirrored images too, with those in place of the images where `flipped`, bool
    [rows]; a mirrored image's crop and mask are mirrored as well.
    """
    chosen, where = dict(arrays), flipped[:, None, None, None]
    for name in ("mean", "std"):
        chosen[f"latent_{name}"] = np.where(where, arrays[f"flipped_{name}"], arrays[f"latent_{name}"])
    left, top, right, bottom = np.asarray(arrays["crop"]).T
    width = np.asarray(arrays["width"])
    mirrored = np.stack([width - right, top, width - left, bottom], 1)
    chosen["crop"] = np.where(flipped[:, None], mirrored, arrays["crop"])
    if "mask" in arrays:
        chosen["mask"] = np.where(where, np.flip(arrays["mask"], 3), arrays["mask"])
    return chosen


class LatentTask(abc.ABC):
    """A task on one worker's device. The training loop calls its methods."""

    columns: ClassVar[tuple[str, ...]] = ("caption", "latent_mean", "latent_std", *SIZE_COLUMNS)
    """Columns of the latent table that are read."""

    def __init__(self, base: BaseModel, config: ModelConfig, *, seed: int, dtype: torch.dtype, device: str) -> None:
        self.base, self.config, self.seed = base.read_captions(config.captions), config, seed
        self.dtype, self.device = dtype, device
        self.module = build_network(base, config, seed)
        self._captions = CaptionCache(load_text_encoder(self.base, device=device))

    @abc.abstractmethod
    def row_conditions(self, arrays: Mapping[str, Any], captions: Sequence[str]) -> dict[str, Tensor]:
        """Arguments of the losses besides data, noise and times: the rows' condition by the denoiser's argument names,
        and `mask` if not every pixel counts.
        """

    @abc.abstractmethod
    def preview_images(
        self, network: Callable[..., Any], config: PreviewConfig, held: Mapping[str, Any] | None, micro_batch: int
    ) -> list[Image.Image]:
        """Pictures sampled from the current weights, at most `micro_batch` at a time; `held` has held-out rows of the
        first table, if there are any.
        """

    def text_states(self, captions: Sequence[str]) -> Tensor:
        """The text states [len(captions), tokens, width], the part of `condition` that every network reads."""
        return self.condition(captions)["text_states"]

    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What captions give, [len(captions), ...] by the denoiser's argument names; each distinct one encoded once."""
        return self._captions(captions)

    def text_of_rows(self, captions: Sequence[str], arrays: Mapping[str, Any]) -> dict[str, Tensor]:
        """The condition of rows of a latent table, with the image sizes if the network reads them (SDXL)."""
        condition = self.condition(captions)
        if "pooled_text" in condition:
            condition["time_ids"] = sizes_of_rows(arrays).to(self.device)
        return condition

    def to_batch(self, arrays: Mapping[str, Any]) -> dict[str, Tensor]:
        """Columns of a latent table, with `epoch` and `row`, -> tensors. A column `noise` is the noise (reflow); of
        columns with the mirrored images' latents, half the samples of an epoch are taken.
        """
        keys = sample_keys(arrays["epoch"], arrays["row"])
        if "flipped_mean" in arrays:
            arrays = flipped_rows(arrays, keyed_uniform(self.seed, keys, "flip") < 0.5)
        mean = np.asarray(arrays["latent_mean"], dtype=np.float32)
        std = np.asarray(arrays["latent_std"], dtype=np.float32)
        data = mean + std * keyed_normal(self.seed, keys, mean.shape[1:], "latent")
        dropped = keyed_uniform(self.seed, keys, "caption") < self.config.caption_dropout
        captions = ["" if drop else str(caption) for drop, caption in zip(dropped, arrays["caption"], strict=True)]
        return {
            "data": torch.from_numpy(data).to(self.device),
            "noise": self._noise(arrays, self.seed, keys, "noise"),
            "uniform": torch.from_numpy(keyed_uniform(self.seed, keys, "time")).to(self.device),
            **self.row_conditions(arrays, captions),
        }

    def _noise(self, arrays: Mapping[str, Any], seed: int, keys: Sequence[str], purpose: str) -> Tensor:
        given = arrays.get("noise")
        shape = arrays["latent_mean"].shape[1:]
        noise = keyed_normal(seed, keys, shape, purpose) if given is None else np.asarray(given, dtype=np.float32)
        return torch.from_numpy(noise).to(self.device)

    def loss(self, network: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """Loss per sample [batch]."""
        field_ = VelocityField(as_denoiser(network, self.dtype), self.base.schedule, self.base.prediction_type)
        _, height, width = self.base.latent_shape(*self.base.default_size)
        return training_loss(self.config, field_, batch, height * width)

    def model(self, network: Callable[..., Any]) -> TrainedModel:
        """The network being trained as a model that is ready to sample."""
        return TrainedModel(
            base=self.base,
            network=cast(nn.Module, network),
            objective=self.config.objective,
            naive_target=self.config.naive_target,
            task=self.config.task,
            sampling=SamplingDefaults(),
        )

    @torch.no_grad()
    def validation_loss(self, network: Callable[..., Any], arrays: Mapping[str, Any]) -> tuple[float, int]:
        """Sum and number of terms of the flow loss at fixed times with fixed noise, comparable between steps, losses
        and runs.
        """
        data = torch.from_numpy(np.asarray(arrays["latent_mean"], dtype=np.float32)).to(self.device)
        noise = self._noise(arrays, 0, sample_keys([0] * len(data), arrays["row"]), "validation")
        times = (torch.arange(VALIDATION_TIMES, device=self.device) + 0.5) / VALIDATION_TIMES
        given = self.row_conditions(arrays, [str(caption) for caption in arrays["caption"]])
        losses = flow_validation_loss(self.model(network).velocity_field, data, noise, times, **given)
        return float(losses.sum()), losses.numel()


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Images side by side on white, row by row."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
