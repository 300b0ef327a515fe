"""LoRA adapters on a UNet's linear and convolutional layers, through PEFT.

An adapter adds `alpha / rank * B A` to a layer. On a convolution, A is a convolution of the same kernel, stride and
padding onto `rank` channels and B a 1x1 convolution: `rank * (k * k * in + out)` numbers. Biases stay as they are.

The presets are those of the paper, with the layers that its parameter counts on SD 2.1 (865.9 M) imply:

| preset    | convolutions            | attention q, k, v | attention out, feed-forward | ends          | trained |
|-----------|-------------------------|-------------------|-----------------------------|---------------|---------|
| base      | ceil(0.2 * max(in,out)) | likewise          | -                           | trained fully | 207.5 M |
| small     | 64                      | 64                | 64                          | trained fully | 64.7 M  |
| attention | -                       | 64                | -                           | -             | 10.1 M  |

- Convolutions: every Conv2d between the ends: 3x3 ones, strided and upsampling ones, the 1x1 shortcuts of residual
  blocks, and the transformers' `proj_in` and `proj_out` where these are convolutions (SD 1.5).
- Attention is self- and cross-attention. Its output projection counts as feed-forward, as do `proj_in` and `proj_out`
  where they are linear (SD 2.1, SDXL): with q, k, v and out at rank 64 the last preset would have 13.3 M.
- Ends: `conv_in` and `conv_out` with their biases, through PEFT's `modules_to_save`.
- The time embedding and its projections (`time_emb_proj`) are never adapted.

Source: Schusterbauer et al., "Diff2Flow", CVPR 2025, arXiv:2506.02221.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from d2f_core.file_systems import backend
from d2f_core.model.config import LoraConfig
from d2f_core.model.denoiser import extend_input_channels
from d2f_core.model.fit import meta_tensors

ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
RESNET = r".*\.(conv1|conv2|conv_shortcut|time_emb_proj)"
FEED_FORWARD = r".*\.(proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)"
ENDS = r".*samplers\.0\.conv|conv_in|conv_out"
TARGETS = {"attention": ATTENTION, "all": "|".join(f"({part})" for part in (ATTENTION, RESNET, FEED_FORWARD, ENDS))}

QUERY_KEY_VALUE = r".*\.attn[12]\.to_[qkv]"
CONVOLUTIONS = r".*\.(conv1|conv2|conv_shortcut)|.*samplers\.0\.conv"
PROJECTIONS = r".*\.proj_(in|out)"
OUT_AND_FEED_FORWARD = r".*\.(to_out\.0|ff\.net\.0\.proj|ff\.net\.2)"
TRAINED_ENDS = ("conv_in", "conv_out")
PRESET_RANK = 64
PEFT_PREFIX = "base_model.model."
ADAPTER_NAME = "adapter_model.safetensors"


class AdapterError(ValueError):
    """An adapter does not fit the network; the message gives the keys and the fix."""


def _preset_targets(unet: UNet2DConditionModel, preset: str) -> str:
    """Regular expression of the names of the layers that get an adapter."""
    parts = [QUERY_KEY_VALUE]
    if preset in ("base", "small"):
        parts.append(CONVOLUTIONS)
    if preset == "small":
        parts.append(OUT_AND_FEED_FORWARD)
    if preset == "small" or (preset == "base" and not unet.config["use_linear_projection"]):
        parts.append(PROJECTIONS)
    return "|".join(f"({part})" for part in parts)


def preset_ranks(unet: UNet2DConditionModel, preset: str) -> dict[str, int]:
    """Layer name -> rank of its adapter, in the network's order."""
    targets = re.compile(_preset_targets(unet, preset))
    layers = {name: layer for name, layer in unet.named_modules() if targets.fullmatch(name)}
    if preset != "base":
        return dict.fromkeys(layers, PRESET_RANK)
    return {name: -(-max(cast(Tensor, layer.weight).shape[:2]) // 5) for name, layer in layers.items()}


def _preset_config(unet: UNet2DConditionModel, preset: str) -> PeftLoraConfig:
    ranks = preset_ranks(unet, preset)
    if not ranks:
        raise AdapterError(f"no layer of the network fits preset={preset!r}. Use a UNet with attention.")
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    return PeftLoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=dict(others),
        alpha_pattern=dict(others),
        # A pattern, because PEFT would write a list of names in an order that differs between processes.
        target_modules=_preset_targets(unet, preset),
        modules_to_save=None if preset == "attention" else list(TRAINED_ENDS),
    )


def _peft_config(unet: UNet2DConditionModel, config: LoraConfig) -> PeftLoraConfig:
    if config.preset:
        return _preset_config(unet, config.preset)
    return PeftLoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.alpha or config.rank),
        target_modules=TARGETS[config.targets],
    )


def add_lora(unet: UNet2DConditionModel, config: LoraConfig, *, seed: int = 0) -> PeftModel:
    """Freeze the UNet and add adapters that change nothing yet (B starts at zero); A is drawn from `seed`.

    Only the adapters, and the ends under the presets `base` and `small`, have `requires_grad`. The output equals the
    frozen UNet's to the last bit. It may differ from a UNet with trainable weights by rounding (6e-7), for which torch
    computes a linear layer on a transposed input in another way.
    """
    peft_config = _peft_config(unet, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(PeftModel, get_peft_model(cast(Any, unet), peft_config))


def read_adapter(adapter: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter by PEFT's names."""
    file = adapter / ADAPTER_NAME
    return load_file(file, backend=backend(file))


def _fit_unet(unet: UNet2DConditionModel, adapter: Path, weights: Mapping[str, Tensor]) -> PeftLoraConfig:
    """A saved adapter's config, after extending the UNet's input channels to match.

    Args:
        weights: the adapter's tensors, which may be on torch's meta device, by the UNet's names.
    """
    config = cast(PeftLoraConfig, PeftLoraConfig.from_pretrained(str(adapter)))
    for end in config.modules_to_save or ():
        missing = {f"{end}.{name}" for name, _ in unet.get_submodule(end).named_parameters()} - weights.keys()
        if missing:
            raise AdapterError(
                f"{adapter} says that {end} was trained, but lacks {sorted(missing)}. Copy the whole adapter again."
            )
    for name in ("conv_in.weight", "conv_in.lora_A.weight"):
        if name in weights and weights[name].shape[1] > unet.config["in_channels"]:
            extend_input_channels(unet, weights[name].shape[1] - unet.config["in_channels"])
    return config


def _by_unet_names(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PEFT_PREFIX): value for name, value in saved.items()}


def _check_taken(network: nn.Module, weights: dict[str, Tensor], adapter: Path, adapter_name: str) -> None:
    """Raise AdapterError unless all tensors were loaded: PEFT and diffusers drop unknown ones, or only warn."""
    taken = _by_unet_names(get_peft_model_state_dict(cast(Any, network), adapter_name=adapter_name))
    differing = [
        name
        for name in sorted(weights.keys() | taken.keys())
        if name not in weights or name not in taken or not torch.equal(weights[name].to(taken[name]), taken[name])
    ]
    if differing:
        raise AdapterError(
            f"{len(differing)} tensors of the adapter {adapter} and the network do not agree, such as {differing[:3]}. "
            "Load it into the base that it was trained on."
        )


def load_lora(unet: UNet2DConditionModel, adapter: Path) -> nn.Module:
    """The UNet with a saved adapter merged into its weights, including fully trained ends.

    Raises:
        AdapterError: the network has not taken over each tensor of the adapter, or needs more of them.
    """
    saved = read_adapter(adapter)
    network = get_peft_model(cast(Any, unet), _fit_unet(unet, adapter, _by_unet_names(saved)))
    set_peft_model_state_dict(network, saved)
    _check_taken(network, _by_unet_names(saved), adapter, "default")
    return cast(Any, network).merge_and_unload()


def describe_lora(unet: UNet2DConditionModel, adapter: Path) -> nn.Module:
    """Like `load_lora`, by the header of the adapter's file, for a UNet on torch's meta device.

    Raises:
        AdapterError: the network lacks a layer of the adapter, has another shape there, or needs more of them.
        HeaderError: the adapter's file is damaged.
    """
    saved = meta_tensors(adapter / ADAPTER_NAME)
    with torch.device("meta"):
        network = cast(PeftModel, get_peft_model(cast(Any, unet), _fit_unet(unet, adapter, _by_unet_names(saved))))
    _check_shapes(network, saved, adapter)
    return unet


def _check_shapes(network: PeftModel, saved: Mapping[str, Tensor], adapter: Path) -> None:
    """Raise AdapterError when ranks or adapted layers differ; network and tensors may be on torch's meta device."""
    wanted = {(name, value.shape) for name, value in get_peft_model_state_dict(cast(Any, network)).items()}
    if odd := sorted({name for name, _ in wanted ^ {(name, value.shape) for name, value in saved.items()}}):
        raise AdapterError(
            f"{len(odd)} of {len(wanted)} tensors of {adapter} have other shapes than the network's, such as {odd[0]}. "
            "Use the LoRA settings that it was trained with."
        )


def check_adapter(network: PeftModel, adapter: Path) -> None:
    """Check by the header of its file that a saved adapter has the same layers and ranks as the network's own.

    Args:
        network: may be on torch's meta device.

    Raises:
        AdapterError: ranks or adapted layers differ.
    """
    _check_shapes(network, meta_tensors(adapter / ADAPTER_NAME), adapter)


def set_adapter(network: PeftModel, adapter: Path) -> None:
    """Set newly added adapters to the values of a saved adapter with the same layers and ranks.

    Raises:
        AdapterError: see `check_adapter`.
    """
    check_adapter(network, adapter)
    saved = read_adapter(adapter)
    set_peft_model_state_dict(cast(Any, network), saved)
    _check_taken(network, _by_unet_names(saved), adapter, "default")


def load_lora_in_diffusers(
    unet: UNet2DConditionModel, adapter: Path, *, adapter_name: str = "default"
) -> UNet2DConditionModel:
    """The UNet with a saved adapter loaded in place, unmerged, by diffusers' `load_lora_adapter`.

    By default, diffusers knows neither PEFT's key prefix nor `adapter_config.json`, and takes ranks and scales from the
    tensors. Here it gets prefix and config as metadata, `modules_to_save` included, so the trained ends are active too.
    diffusers cannot switch the ends off: after `disable_lora` they stay active until `enable_adapters(False)` is called
    on `unet.conv_in` and `unet.conv_out`.

    Raises:
        AdapterError: the network has not taken over each tensor of the adapter, or needs more of them.
    """
    weights = _by_unet_names(read_adapter(adapter))
    config = _fit_unet(unet, adapter, weights)
    # diffusers infers the format of all keys from the first one.
    adapters_first = dict(sorted(weights.items(), key=lambda item: ".lora_" not in item[0]))
    cast(Any, unet).load_lora_adapter(adapters_first, prefix=None, adapter_name=adapter_name, metadata=config.to_dict())
    _check_taken(unet, weights, adapter, adapter_name)
    return unet
