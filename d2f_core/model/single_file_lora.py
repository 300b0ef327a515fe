"""A UNet's LoRA as one safetensors file, in the layout of kohya's sd-scripts, which ComfyUI and diffusers read too.

The layer `mid_block.attentions.0.proj_in` of a diffusers UNet has the keys

    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight   [rank, in], of a convolution [rank, in, kh, kw]
    lora_unet_mid_block_attentions_0_proj_in.lora_up.weight     [out, rank], of a convolution [out, rank, 1, 1]
    lora_unet_mid_block_attentions_0_proj_in.alpha              scalar: the layer adds alpha / rank * up(down(x))
    lora_unet_mid_block_attentions_0_proj_in.diff_b             [out]: added to the bias; only where one was trained

A layer that was trained whole is a LoRA of full rank: exact, with one factor the identity, and small for a UNet's first
and last convolution. Who reads what:

- ComfyUI and Forge: everything, `diff_b` too.
- diffusers (`load_lora_weights`): it refuses a file with a `diff_b`. 0.30 to 0.38 lose `conv_in` and `conv_out`, whose
  names they misread, with a warning. 0.42 applies an alpha that is not the file's most frequent one to convolutions,
  but not to attention projections. So all layers get the same alpha here, and the ratio to a layer's own scale is
  multiplied into its `lora_up`.
- sd-scripts: the layers inside transformer, resnet, down- and upsampling blocks. Others (`conv_in`, `conv_out`, the
  time embedding) and `diff_b` it passes over. For SDXL, whose layers it calls by other names, it translates these keys
  since May 2024.

So the layers outside the blocks, the ends of a UNet, go to a second file (`write_ends`), in keys that diffusers,
ComfyUI and Forge all read, but for the last two, which say the same and are there where a bias was trained:

    unet.conv_in.lora_A.weight          [rank, in, kh, kw]
    unet.conv_in.lora_B.weight          [out, rank, 1, 1], with the layer's scale
    unet.conv_in.lora_B.bias            [out]: for diffusers, where PEFT knows `lora_bias` (0.17 does, 0.13 does not)
    lora_unet_conv_in.diff_b            [out]: for ComfyUI and Forge

The bias could not stand in the first file: a `lora_B.bias` makes PEFT expect one in each layer of a file, and then
refuse to merge those that have none.

Sources: kohya-ss/sd-scripts networks/lora.py; ComfyUI comfy/lora.py; diffusers loaders/lora_conversion_utils.py and
loaders/peft.py.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer as PeftLoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

PREFIX = "lora_unet_"
KOHYA_PARTS = ("down_blocks_", "mid_block_", "up_blocks_")
"""Prefixes of the blocks in which sd-scripts looks for layers."""


class SingleFileLoraError(ValueError):
    """The layout cannot hold the adapter, or a file does not follow the layout or does not fit the network."""


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """The change that an adapter makes to one linear or convolutional layer."""

    down: Tensor
    """[rank, in] or [rank, in, kh, kw]."""
    up: Tensor
    """[out, rank] or [out, rank, 1, 1]."""
    alpha: float
    """The weight changes by `alpha / rank * up @ down`."""
    bias: Tensor | None = None
    """[out]: the change of the bias."""

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def weight(self) -> Tensor:
        """The change of the weight, float32 [out, in] or [out, in, kh, kw]."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.alpha / self.rank * product).reshape(len(self.up), *self.down.shape[1:])


@dataclass(frozen=True, kw_only=True)
class SingleFileLora:
    """The contents of a single-file LoRA."""

    layers: Mapping[str, LayerChange]
    """Changes by layer name, with underscores and without the prefix `lora_unet_`."""
    metadata: Mapping[str, str]


def _from_lora_layer(name: str, layer: PeftLoraLayer, adapter: str) -> LayerChange:
    if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
        raise SingleFileLoraError(
            f"{name!r} has a DoRA or a LoRA with a bias, which this layout cannot hold. Export in diffusers' layout, "
            "or train without use_dora and lora_bias."
        )
    down = cast(Tensor, cast(Any, layer.lora_A[adapter]).weight).detach()
    up = cast(Tensor, cast(Any, layer.lora_B[adapter]).weight).detach()
    return LayerChange(down=down, up=up, alpha=layer.scaling[adapter] * len(down))


def _from_whole_layer(name: str, before: nn.Module, after: nn.Module) -> LayerChange:
    """A fully trained layer as a LoRA of full rank, one factor of which is the identity."""
    if not isinstance(before, nn.Linear | nn.Conv2d):
        raise SingleFileLoraError(
            f"{name!r}, trained whole, is a {type(before).__name__}; the layout holds linear and convolutional layers. "
            "Export in diffusers' layout."
        )
    trained = cast(nn.Linear | nn.Conv2d, after)
    weight = (trained.weight - before.weight).detach().flatten(1)
    rank, shape = min(weight.shape), before.weight.shape[1:]
    identity = torch.eye(rank, dtype=weight.dtype)
    up, down = (weight, identity) if weight.shape[0] > weight.shape[1] else (identity, weight)
    bias = None
    if before.bias is not None and trained.bias is not None and not torch.equal(before.bias, trained.bias):
        bias = (trained.bias - before.bias).detach()
    up = up.reshape(*up.shape, *(1,) * (len(shape) - 1))
    return LayerChange(down=down.reshape(rank, *shape), up=up, alpha=rank, bias=bias)


def layer_changes(network: PeftModel) -> dict[str, LayerChange]:
    """The changes that a UNet's unmerged adapter makes, by layer name with dots.

    Raises:
        SingleFileLoraError: the adapter has parts that the layout cannot hold.
    """
    adapter = cast(str, network.active_adapter)
    if (biases := cast(Any, network.peft_config[adapter]).bias) != "none":
        raise SingleFileLoraError(f"the adapter trained biases (bias={biases!r}). Export in diffusers' layout.")
    changes = {}
    for name, module in cast(nn.Module, network.base_model.model).named_modules():
        if isinstance(module, PeftLoraLayer):
            changes[name] = _from_lora_layer(name, module, adapter)
        elif isinstance(module, ModulesToSaveWrapper):
            changes[name] = _from_whole_layer(name, module.original_module, module.modules_to_save[adapter])
    return changes


def common_alpha(changes: Mapping[str, LayerChange]) -> float:
    """The most frequent alpha, which `write_single_file_lora` uses for all layers."""
    return Counter(change.alpha for change in changes.values()).most_common(1)[0][0]


def kohya_metadata(changes: Mapping[str, LayerChange]) -> dict[str, str]:
    """Metadata of a LoRA that sd-scripts and related tools read."""
    ranks = {change.rank for change in changes.values()}
    alpha = f"{common_alpha(changes):g}"
    kernels = {c.rank for c in changes.values() if c.down.ndim == 4 and math.prod(c.down.shape[2:]) > 1}
    arguments = {"conv_dim": str(kernels.pop()), "conv_alpha": alpha} if len(kernels) == 1 else {}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(arguments),
    }


def outside_blocks(changes: Mapping[str, LayerChange]) -> dict[str, LayerChange]:
    """The layers at the ends of a UNet, which sd-scripts ignores, in SD 1.5, SD 2.1 and SDXL alike."""
    return {name: each for name, each in changes.items() if not name.replace(".", "_").startswith(KOHYA_PARTS)}


def write_single_file_lora(
    file: Path, changes: Mapping[str, LayerChange], metadata: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> int:
    """Write `changes`, by layer name with dots or underscores, and return the number of keys.

    The number is also added to `metadata` as `d2f_keys`, so that a reader can detect missing keys.
    """
    alpha, tensors = common_alpha(changes), dict[str, Tensor]()
    for name, change in changes.items():
        key = PREFIX + name.replace(".", "_")
        if f"{key}.alpha" in tensors:
            raise SingleFileLoraError(f"two layers would share the key {key!r}. Rename one of them.")
        up = change.up if change.alpha == alpha else change.up * (change.alpha / alpha)
        tensors[f"{key}.lora_down.weight"] = change.down.to(dtype).contiguous()
        tensors[f"{key}.lora_up.weight"] = up.to(dtype).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        if change.bias is not None:
            tensors[f"{key}.diff_b"] = change.bias.to(dtype).contiguous()
    save_file(tensors, file, {"format": "pt", **metadata, "d2f_keys": str(len(tensors))})
    return len(tensors)


def write_ends(
    file: Path, changes: Mapping[str, LayerChange], metadata: Mapping[str, str], dtype: torch.dtype = torch.float32
) -> None:
    """Write the second file, of layers by name with dots."""
    tensors = dict[str, Tensor]()
    for name, change in changes.items():
        adapter = f"unet.{name}.lora_"
        tensors[f"{adapter}A.weight"] = change.down.to(dtype).contiguous()
        tensors[f"{adapter}B.weight"] = (change.up * (change.alpha / change.rank)).to(dtype).contiguous()
        if change.bias is not None:
            bias = tensors[f"{adapter}B.bias"] = change.bias.to(dtype).contiguous()
            tensors[f"{PREFIX}{name.replace('.', '_')}.diff_b"] = bias.clone()  # safetensors refuses shared memory
    save_file(tensors, file, {"format": "pt", **metadata, "d2f_keys": str(len(tensors))})


def read_single_file_lora(file: Path) -> SingleFileLora:
    """Read a single-file LoRA.

    Raises:
        SingleFileLoraError: a key does not follow the layout, a layer is incomplete, or there are fewer keys than were
            written.
    """
    found: dict[str, dict[str, Tensor]] = {}
    with safe_open(file, framework="pt") as opened:
        metadata, keys = opened.metadata() or {}, list(opened.keys())
        if len(keys) != int(metadata.get("d2f_keys", len(keys))):
            raise SingleFileLoraError(
                f"{file} has {len(keys)} keys, but {metadata['d2f_keys']} were written. Export the file again."
            )
        for key in keys:
            layer, _, part = key.removeprefix(PREFIX).partition(".")
            if not key.startswith(PREFIX) or part not in ("lora_down.weight", "lora_up.weight", "alpha", "diff_b"):
                raise SingleFileLoraError(f"{file}: the key {key!r} is not of this layout. Give a UNet's LoRA file.")
            found.setdefault(layer, {})[part] = opened.get_tensor(key)
    layers = {}
    for layer, parts in found.items():
        if missing := {"lora_down.weight", "lora_up.weight", "alpha"} - set(parts):
            raise SingleFileLoraError(f"{file}: the layer {layer!r} has no {sorted(missing)}. Export the file again.")
        down, up, alpha = parts["lora_down.weight"], parts["lora_up.weight"], parts["alpha"].item()
        layers[layer] = LayerChange(down=down, up=up, alpha=alpha, bias=parts.get("diff_b"))
    return SingleFileLora(layers=layers, metadata=metadata)


@torch.no_grad()
def merge_single_file_lora(unet: nn.Module, lora: SingleFileLora) -> None:
    """Add a file's changes to a UNet's weights, in place.

    Raises:
        SingleFileLoraError: a layer is not in the network, or has another shape there.
    """
    modules = {name.replace(".", "_"): module for name, module in unet.named_modules()}
    for layer, change in lora.layers.items():
        module = modules.get(layer)
        if not isinstance(module, nn.Linear | nn.Conv2d) or module.weight.shape != change.weight.shape:
            raise SingleFileLoraError(
                f"the network has no linear or convolutional layer {layer!r} with a weight of "
                f"{tuple(change.weight.shape)}. Give the base model that the file was made for."
            )
        module.weight += change.weight.to(module.weight)
        if change.bias is not None:
            cast(Tensor, module.bias).add_(change.bias)
