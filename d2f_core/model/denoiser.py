"""A diffusers UNet as the callable that the objective expects: `(x_dm, timestep, **condition) -> prediction`.

| base    | prediction_type | condition                                                                          |
|---------|-----------------|------------------------------------------------------------------------------------|
| SD 1.5  | epsilon         | text_states [batch, 77, 768]                                                       |
| SD 2.1  | v_prediction    | text_states [batch, 77, 1024]                                                      |
| SDXL    | epsilon         | text_states [batch, 77, 2048], pooled_text [batch, 1280], time_ids [batch, 6]      |

Each of them can also take `joined_latents` [batch, channels, h, w], such as the latents of an input image, after its
first convolution was widened by `extend_input_channels`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from d2f_core.file_systems import read_or_map
from d2f_core.model.base import BaseModel
from d2f_core.model.base_probe import can_be_asked, check_reading
from d2f_core.model.fit import diffusers_misfit, require_fit, require_safetensors
from d2f_core.model.weight_files import DIFFUSERS_NAME, variant_argument
from d2f_core.objective.alignment import Denoiser

POOLED_AND_TIME_IDS = "text_time"
"""diffusers' `addition_embed_type` of SDXL."""


class ConditionError(ValueError):
    """A condition that the network needs is missing, or was given one that it cannot take."""


def load_unet(
    base: BaseModel, *, from_scratch: bool = False, seed: int = 0, probe: bool = True
) -> UNet2DConditionModel:
    """The base model's UNet in float32; `from_scratch` keeps its config and draws new weights from `seed`.

    Args:
        probe: ask the weights what they predict, if that is not known yet (`base_probe`).

    Raises:
        BaseModelError: the files are missing or damaged, or the weights predict something else than the config says.
    """
    directory = base.path / "unet"
    if from_scratch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cast(Any, UNet2DConditionModel).from_config(UNet2DConditionModel.load_config(directory))
    base.files.require_whole()
    check_unet(base)
    unet = UNet2DConditionModel.from_pretrained(
        directory,
        torch_dtype=torch.float32,
        use_safetensors=True,
        variant=variant_argument(directory, DIFFUSERS_NAME),
        **read_or_map(directory),
    )
    if probe and can_be_asked(unet):
        check_reading(base, unet)
    return unet


def check_unet(base: BaseModel) -> UNet2DConditionModel:
    """The base model's empty UNet, after a comparison with the headers of its files.

    Raises:
        BaseModelError: there are no safetensors, or they are damaged or of another network.
    """
    require_safetensors(base, "unet", "diffusers.UNet2DConditionModel")
    unet = unet_on_meta(base.path / "unet")
    require_fit(base, "unet", lambda: diffusers_misfit(unet, base.path / "unet"))
    return unet


def unet_on_meta(directory: Path) -> UNet2DConditionModel:
    """The UNet of a directory on torch's meta device: names, shapes and config without weights."""
    with torch.device("meta"):
        return cast(Any, UNet2DConditionModel).from_config(UNet2DConditionModel.load_config(directory))


def as_denoiser(network: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Denoiser:
    """Adapt a UNet that computes in `dtype`, bare or inside an engine or PEFT's wrapper.

    The result is called with (x_dm [batch, C, h, w], timestep [batch], any float, and by name):
        text_states: [batch, tokens, width] for the cross-attention; every network takes them.
        pooled_text, time_ids: [batch, width] and [batch, 6], which SDXL needs and no other may get. `time_ids` are
            (height, width, crop top, crop left, target height, target width) in pixels; they stay in float32, since
            bfloat16 holds whole numbers only up to 256.
        joined_latents: [batch, extra, h, w], joined to `x_dm` on the channel axis, for a network with C + extra inputs.
    It returns the prediction [batch, C, h, w].

    A callable that does not wrap a `UNet2DConditionModel` receives the arguments unchecked.

    Raises:
        ConditionError: raised by the result when a condition is missing, not needed, or of the wrong shape; raised at
            once when the network needs a condition other than these.
    """
    config = _unet_config(network)
    if config and config["addition_embed_type"] not in (None, POOLED_AND_TIME_IDS):
        raise ConditionError(
            f"the UNet has addition_embed_type={config['addition_embed_type']!r}, but only None (SD 1.5, SD 2.1) and "
            f"{POOLED_AND_TIME_IDS!r} (SDXL) are supported. Use a base model of one of these families."
        )

    def denoise(
        x_dm: Tensor,
        timestep: Tensor,
        *,
        text_states: Tensor,
        pooled_text: Tensor | None = None,
        time_ids: Tensor | None = None,
        joined_latents: Tensor | None = None,
    ) -> Tensor:
        if config:
            _check_additions(config, len(x_dm), pooled_text, time_ids)
            _check_channels(config["in_channels"], x_dm, joined_latents)
        additions: dict[str, Any] = {}
        if pooled_text is not None and time_ids is not None:
            additions["added_cond_kwargs"] = {"text_embeds": pooled_text.to(dtype), "time_ids": time_ids.float()}
        x = x_dm.to(dtype) if joined_latents is None else torch.cat([x_dm.to(dtype), joined_latents.to(dtype)], 1)
        return network(x, timestep, encoder_hidden_states=text_states.to(dtype), **additions).sample

    return denoise


def _unet_config(network: Callable[..., Any]) -> Any:
    """The config of the wrapped UNet, or None. Never an engine's own `config`, which has another meaning."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    return next((module.config for module in modules if isinstance(module, UNet2DConditionModel)), None)


def _check_additions(config: Any, batch: int, pooled_text: Tensor | None, time_ids: Tensor | None) -> None:
    needed = config["addition_embed_type"] == POOLED_AND_TIME_IDS
    for name, value in (("pooled_text", pooled_text), ("time_ids", time_ids)):
        if needed and value is None:
            raise ConditionError(
                f"{name} is missing: a UNet with addition_embed_type={POOLED_AND_TIME_IDS!r} (SDXL) needs pooled_text "
                f"[batch, width] and time_ids [batch, 6]. Add {name} to the batch."
            )
        if not needed and value is not None:
            raise ConditionError(
                f"{name} of shape {tuple(value.shape)} was given to a UNet with addition_embed_type=None, which takes "
                f"text_states only. Remove {name} from the batch, or use an SDXL base."
            )
    if pooled_text is None or time_ids is None:
        return
    width, each = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
    shapes = tuple(pooled_text.shape), tuple(time_ids.shape)
    if (
        [len(shape) for shape in shapes] != [2, 2]
        or {shape[0] for shape in shapes} != {batch}
        or shapes[0][1] + each * shapes[1][1] != width
    ):
        raise ConditionError(
            f"pooled_text and time_ids have shapes {shapes[0]} and {shapes[1]}, but with a batch of {batch} this UNet "
            f"needs [{batch}, width] and [{batch}, n] with width + {each} * n = {width}. "
            f"Give 6 time ids and a pooled text of width {width - 6 * each}."
        )


def _check_channels(in_channels: int, x_dm: Tensor, joined_latents: Tensor | None) -> None:
    extra = in_channels - x_dm.shape[1]
    if joined_latents is None:
        if extra:
            raise ConditionError(
                f"x_dm has {x_dm.shape[1]} channels and joined_latents are missing, but the UNet has {in_channels} "
                f"input channels. Give joined_latents with {extra} channels, or a network with {x_dm.shape[1]} inputs."
            )
        return
    wanted = (len(x_dm), extra, *x_dm.shape[2:])
    if not extra:
        raise ConditionError(
            f"joined_latents of shape {tuple(joined_latents.shape)} were given to a UNet whose {in_channels} input "
            "channels x_dm fills. Remove them, or make room with extend_input_channels."
        )
    if tuple(joined_latents.shape) != wanted:
        raise ConditionError(
            f"joined_latents have shape {tuple(joined_latents.shape)}, but beside x_dm {tuple(x_dm.shape)} the UNet "
            f"with {in_channels} input channels needs {wanted}. Encode the joined picture at the size of the target."
        )


def extend_input_channels(unet: UNet2DConditionModel, extra: int) -> UNet2DConditionModel:
    """Give the first convolution `extra` more input channels, in place; zeros in them leave the output unchanged.

    The new weights are copies of the old ones, so from the first step the network reads the new channels as it reads
    its own input. (Marigold, arXiv:2312.02145, halves both; then zeros in the new channels would change the function.)
    With weights that start at zero, a training takes several times as long to use the new channels.

    Call it before adapters are added; only methods that train `conv_in` (full finetuning, the LoRA presets `base` and
    `small`, the LoRA targets `all`) can learn to read the new channels. `unet.config.in_channels` follows.

    Raises:
        ValueError: `extra` is below 1, or the first convolution is already wrapped by an adapter.
    """
    old = unet.conv_in
    if extra < 1:
        raise ValueError(f"extra={extra} input channels: must be at least 1. Give the joined latents' channels, say 4.")
    if type(old) is not nn.Conv2d:
        raise ValueError(
            f"conv_in is a {type(old).__name__}, and only a plain Conv2d can be extended. "
            "Call extend_input_channels before adding adapters."
        )
    # skip_init draws no random numbers, so the caller's generator state is unchanged.
    wider: nn.Conv2d = cast(Any, nn.utils.skip_init)(
        nn.Conv2d,
        old.in_channels + extra,
        old.out_channels,
        old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    with torch.no_grad():
        wider.weight.copy_(old.weight[:, torch.arange(wider.in_channels) % old.in_channels])
        if wider.bias is not None and old.bias is not None:
            wider.bias.copy_(old.bias)
    unet.conv_in = wider.requires_grad_(old.weight.requires_grad)
    unet.register_to_config(in_channels=wider.in_channels)
    return unet


def network_dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype
