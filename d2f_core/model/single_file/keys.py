"""The names of Stable Diffusion's tensors in its original single file, for each tensor of a directory in diffusers'.

    model.diffusion_model.   the UNet                  first_stage_model.          the autoencoder
    cond_stage_model.        SD 1.5, SD 2.1: the text encoder
    conditioner.embedders.   SDXL: 0.transformer. is OpenAI's CLIP, 1.model. is OpenCLIP

One table, made of the networks' own tensor names, is read in both directions: `join` makes a tensor of the file,
`part` takes it apart again. OpenCLIP keeps query, key and value as the rows of one tensor, and its projection
transposed; the autoencoder's attention is made of 1x1 convolutions. Everything else differs in names alone.

Source: the keys of the published files v1-5-pruned-emaonly, v2-1_768-ema-pruned and sd_xl_base_1.0.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
DOWN_BLOCKS, UP_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
Form = Literal["same", "transposed", "convolution"]

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
}  # fmt: skip
_UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_RESNET = {
    "norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPENCLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
_QUERY = re.compile(r"(.*\.self_attn)\.q_proj\.(weight|bias)")


class LayoutError(ValueError):
    """A model that the original layout cannot hold, or a file that is not of this layout; with the fix."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the file, and the tensors of a network that it is made of."""

    key: str
    names: tuple[str, ...]
    """Names in the network, of which the file's tensor has the rows one below the other."""
    form: Form = "same"
    """`transposed`: a matrix with rows and columns exchanged. `convolution`: a matrix with two more dimensions of 1."""

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The file's tensor, of the network's tensors in the order of `names`."""
        whole = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
        if self.form == "transposed":
            return whole.T
        return whole[..., None, None] if self.form == "convolution" else whole

    def part(self, whole: Tensor) -> list[Tensor]:
        """The network's tensors in the order of `names`, of the file's tensor: the inverse of `join`.

        Raises:
            LayoutError: the tensor has other dimensions than the layout's.
        """
        if self.form == "transposed":
            whole = whole.T
        elif self.form == "convolution" and whole.ndim == 4:  # some programs keep the matrix
            whole = whole.reshape(whole.shape[:2])
        if not whole.ndim or len(whole) % len(self.names):
            raise LayoutError(f"{self.key!r} has the shape {list(whole.shape)}. Take the file from its source again.")
        return list(whole.chunk(len(self.names)))


def unet_entries(names: Iterable[str], config: Mapping[str, Any]) -> list[Entry]:
    """The table of a UNet.

    Args:
        names: its tensors' names in diffusers.
        config: its config in diffusers.

    Raises:
        LayoutError: the network has blocks that the layout has no names for.
    """
    modules = _unet_modules(config)
    return [Entry(key=UNET + _renamed(name, modules), names=(name,)) for name in names]


def _unet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' name of a module -> the file's."""
    layers, modules = config["layers_per_block"], dict(_UNET_ENDS)
    kinds = (*config["down_block_types"], *config["up_block_types"])
    if not isinstance(layers, int) or not {*kinds} <= {*DOWN_BLOCKS, *UP_BLOCKS}:
        raise LayoutError(
            f"the UNet has layers_per_block={layers} and the blocks {sorted({*kinds})}; the layout has names for one "
            f"number of layers and for {', '.join((*DOWN_BLOCKS, *UP_BLOCKS))}. Export in diffusers' layout."
        )
    for layer in (0, 1):
        modules |= _inside(f"mid_block.resnets.{layer}", f"middle_block.{2 * layer}", _UNET_RESNET)
    for block in range(len(config["down_block_types"])):
        first = 1 + block * (layers + 1)
        for layer in range(layers):
            modules |= _unet_layer(f"down_blocks.{block}", layer, f"input_blocks.{first + layer}")
        modules[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
    for block, kind in enumerate(config["up_block_types"]):
        first = block * (layers + 1)
        for layer in range(layers + 1):
            modules |= _unet_layer(f"up_blocks.{block}", layer, f"output_blocks.{first + layer}")
        place = 2 if kind == "CrossAttnUpBlock2D" else 1  # behind the last layer's attention, if there is one
        modules[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{place}.conv"
    return modules


def _unet_layer(block: str, layer: int, place: str) -> dict[str, str]:
    return {
        **_inside(f"{block}.resnets.{layer}", f"{place}.0", _UNET_RESNET),
        f"{block}.attentions.{layer}": f"{place}.1",
    }


def _inside(module: str, place: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{module}.{name}": f"{place}.{there}" for name, there in parts.items()}


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    """A tensor's name after its longest known module was renamed."""
    words = name.split(".")
    for end in range(len(words), 0, -1):
        if (place := modules.get(".".join(words[:end]))) is not None:
            return ".".join([place, *words[end:]])
    raise LayoutError(f"the layout has no name for {name!r}. Export in diffusers' layout.")


def vae_entries(names: Iterable[str], config: Mapping[str, Any]) -> list[Entry]:
    """The table of an AutoencoderKL; arguments and errors as of `unet_entries`."""
    modules = _vae_modules(config)
    attentions = re.compile(r".*\.attentions\.0\.(to_q|to_k|to_v|to_out\.0)\.weight")
    return [
        Entry(
            key=AUTOENCODER + _renamed(name, modules),
            names=(name,),
            form="convolution" if attentions.fullmatch(name) else "same",
        )
        for name in names
    ]


def _vae_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' name of a module -> the file's, which counts the decoder's blocks from the image."""
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    blocks, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for half in ("encoder", "decoder"):
        ends = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
        modules |= _inside(half, half, ends)
        modules |= _inside(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
        for layer in (0, 1):
            modules |= _inside(f"{half}.mid_block.resnets.{layer}", f"{half}.mid.block_{layer + 1}", _VAE_RESNET)
    for block in range(blocks):
        down, up = f"encoder.down.{block}", f"decoder.up.{blocks - 1 - block}"
        modules[f"encoder.down_blocks.{block}.downsamplers.0.conv"] = f"{down}.downsample.conv"
        modules[f"decoder.up_blocks.{block}.upsamplers.0.conv"] = f"{up}.upsample.conv"
        for layer in range(layers + 1):
            modules |= _inside(f"encoder.down_blocks.{block}.resnets.{layer}", f"{down}.block.{layer}", _VAE_RESNET)
            modules |= _inside(f"decoder.up_blocks.{block}.resnets.{layer}", f"{up}.block.{layer}", _VAE_RESNET)
    return modules


def clip_entries(names: Iterable[str], prefix: str) -> list[Entry]:
    """The table of OpenAI's CLIP, whose names are transformers' own.

    Args:
        names: its tensors' names in transformers, without a leading `text_model.`.
        prefix: before each key.
    """
    return [Entry(key=f"{prefix}text_model.{name}", names=(name,)) for name in names]


def openclip_entries(names: Iterable[str], prefix: str) -> list[Entry]:
    """The table of OpenCLIP; arguments as of `clip_entries`.

    Raises:
        LayoutError: the layout has no name for a tensor.
    """
    found = []
    for name in names:
        if query := _QUERY.fullmatch(name):
            attention, kind = query.groups()
            key = _renamed(attention, _openclip_modules(attention)) + f".in_proj_{kind}"
            found.append(
                Entry(key=prefix + key, names=tuple(f"{attention}.{which}_proj.{kind}" for which in ("q", "k", "v")))
            )
        elif not re.fullmatch(r".*\.self_attn\.[kv]_proj\.\w+", name):
            form: Form = "transposed" if name == "text_projection.weight" else "same"
            found.append(Entry(key=prefix + _renamed(name, _openclip_modules(name)), names=(name,), form=form))
    return found


def _openclip_modules(name: str) -> dict[str, str]:
    """diffusers' name of a module -> the file's, of the module's own layer alone."""
    if not (layer := re.match(r"encoder\.layers\.(\d+)\.", name)):
        return _OPENCLIP_ENDS
    place = f"transformer.resblocks.{layer[1]}"
    module = layer[0].rstrip(".")
    return {**_inside(module, place, _OPENCLIP_LAYER), f"{module}.self_attn": f"{place}.attn"}
