"""The student: a vision transformer whose attention is adapted by LoRA, so that it starts as the network itself."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from d2f_core.correspondence.config import StudentConfig
from d2f_core.correspondence.matching import Grid
from d2f_core.model.vision import VisionModel

QUERY_AND_VALUE = ({"query", "q_proj"}, {"value", "v_proj"})
"""What releases of transformers call an attention's projections to queries and to values."""
BY_BLOCK = ("stage_names", "out_features", "out_indices")
"""Fields of a config that name the blocks one by one."""


class StudentError(ValueError):
    """A network cannot be the student; the message gives the reason and the fix."""


def load_network(config: StudentConfig, device: str | torch.device = "cpu") -> nn.Module:
    """The vision transformer, cut to the blocks that are computed; on "meta" without weights.

    Raises:
        StudentError: it has no blocks of its own, fewer than are asked for, or no patches.
        VisionModelError: see `d2f_core.model.vision.VisionModel`.
    """
    return cut(cast(nn.Module, VisionModel(config.base, device).network), config)


def cut(network: nn.Module, config: StudentConfig) -> nn.Module:
    """A whole vision transformer without the blocks that are not computed; it is changed in place.

    Raises:
        StudentError: as `load_network`.
    """
    patch_size(network, config.base)
    blocks = _blocks(network, config.base)
    layers = config.layers or len(blocks)
    if layers > len(blocks) or config.first_block >= layers:
        raise StudentError(
            f"{config.base!r} has {len(blocks)} blocks; layers={config.layers} and first_block={config.first_block} "
            "do not fit. Compute at most all, and adapt at least the last."
        )
    if layers < len(blocks):
        del blocks[layers:]
        cast(Any, network).config = _with_layers(cast(Any, network).config, layers)
    return network


def _with_layers(config: Any, layers: int) -> Any:
    """A network's config for fewer blocks; what it lists by block (a backbone's stages) is drawn up again."""
    values = {name: value for name, value in config.to_dict().items() if name not in BY_BLOCK}
    new = type(config).from_dict({**values, "num_hidden_layers": layers})
    new._attn_implementation = config._attn_implementation
    return new


def patch_size(network: nn.Module, name: str = "the network") -> int:
    """Height and width of a patch in pixels.

    Raises:
        StudentError: the network cuts images into no patches.
    """
    patch = getattr(cast(Any, network).config, "patch_size", None)
    if not isinstance(patch, int):
        raise StudentError(f"{name!r} cuts images into no patches. Give a vision transformer, such as DINOv2.")
    return patch


def _blocks(network: nn.Module, name: str) -> nn.ModuleList:
    """The transformer's blocks: the list of modules that hold the attentions."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList) and _projections(module)]
    if not lists:
        raise StudentError(f"{name!r} has no blocks with queries and values. Give a vision transformer.")
    return lists[0]


def _projections(module: nn.Module) -> list[str]:
    """Names of the linear layers to queries and to values below a module."""
    wanted = QUERY_AND_VALUE[0] | QUERY_AND_VALUE[1]
    return [
        name for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in wanted
    ]  # fmt: skip


def adapted_layers(network: nn.Module, first_block: int = 0) -> list[str]:
    """Names of the layers that get an adapter: queries and values of the blocks from `first_block` on.

    Raises:
        StudentError: a block has not one of each, because it fuses them or calls them otherwise.
    """
    blocks = _blocks(network, type(network).__name__)
    prefix = next(name for name, module in network.named_modules() if module is blocks)
    found = []
    for number in range(first_block, len(blocks)):
        names = _projections(blocks[number])
        ends = {name.rpartition(".")[2] for name in names}
        if len(names) != 2 or not all(ends & wanted for wanted in QUERY_AND_VALUE):
            raise StudentError(
                f"block {number} of {type(network).__name__} has the projections {names or 'none'}; there must be one "
                "to queries and one to values. Give a network of transformers that keeps them apart."
            )
        found += [f"{prefix}.{number}.{name}" for name in names]
    return found


def add_adapters(network: nn.Module, config: StudentConfig, *, seed: int) -> PeftModel:
    """Freeze the network and add adapters that change nothing yet (B is zero); A is drawn from `seed`."""
    names = adapted_layers(network, config.first_block)
    lora = LoraConfig(
        r=config.rank, lora_alpha=cast(int, config.alpha), lora_dropout=config.dropout, target_modules=names
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(PeftModel, get_peft_model(cast(Any, network), lora))


def tokens(network: Callable[..., Any], pixels: Tensor, patch: int) -> tuple[Tensor, Grid]:
    """Features [images, tokens, channels] of prepared images [images, 3, h, w], and their grid.

    Class and register tokens, which come first, are left out.
    """
    grid = pixels.shape[2] // patch, pixels.shape[3] // patch
    return patch_tokens(all_tokens(network, pixels), grid), grid


def all_tokens(network: Callable[..., Any], pixels: Tensor) -> Tensor:
    """A vision transformer's output [images, tokens, channels], class and register tokens included."""
    return network(pixel_values=pixels).last_hidden_state


def patch_tokens(found: Tensor, grid: Grid) -> Tensor:
    """Those of `all_tokens` that are the grid's."""
    return found[:, found.shape[1] - grid[0] * grid[1] :]


def merge(network: PeftModel) -> nn.Module:
    """The vision transformer with the adapters' products added to its weights; the adapters are gone."""
    return cast(nn.Module, cast(Any, network).merge_and_unload(safe_merge=True))


def trained(network: nn.Module) -> Sequence[tuple[str, nn.Parameter]]:
    """Names and values of what is trained."""
    return [(name, value) for name, value in network.named_parameters() if value.requires_grad]


def save_merged(network: nn.Module, directory: Path) -> None:
    """Write a merged network as a directory that transformers opens by itself."""
    cast(Any, network).save_pretrained(directory, safe_serialization=True)
