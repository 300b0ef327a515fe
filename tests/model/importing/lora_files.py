"""LoRA files in the layouts that people have, for a tiny model, with random factors."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from d2f_core.model.base import resolve_base
from d2f_core.model.denoiser import load_unet
from d2f_core.model.single_file.keys import UNET, unet_entries
from d2f_core.model.text_encoder import TextEncoder, load_text_encoder

RANK = 4
Change = dict[str, Tensor]


def kohya(name: str, down: Tensor, up: Tensor, alpha: float) -> Change:
    key = name.replace(".", "_")
    return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}


def lettered(name: str, down: Tensor, up: Tensor, alpha: float) -> Change:
    """As diffusers and PEFT name them, where a factor of 1 is all that needs no more settings."""
    return {f"{name}.lora_A.weight": down * (alpha / RANK), f"{name}.lora_B.weight": up}


def dotted(name: str, down: Tensor, up: Tensor, alpha: float) -> Change:
    return {f"{name}.lora.down.weight": down * (alpha / RANK), f"{name}.lora.up.weight": up}


def linear_layer(name: str, down: Tensor, up: Tensor, alpha: float) -> Change:
    """As releases of diffusers before PEFT wrote a text encoder's."""
    key = f"{name}.lora_linear_layer"
    return {f"{key}.down.weight": down * (alpha / RANK), f"{key}.up.weight": up}


def processor(name: str, down: Tensor, up: Tensor, alpha: float) -> Change:
    """As the first releases of diffusers wrote attention's four projections."""
    block, _, projection = name.removesuffix(".0").rpartition(".")
    key = f"{block}.processor.{projection}_lora"
    return {f"{key}.down.weight": down * (alpha / RANK), f"{key}.up.weight": up}


def networks_of(base: Path) -> dict[str, nn.Module]:
    model = resolve_base(str(base))
    encoder = load_text_encoder(model)
    assert isinstance(encoder, TextEncoder)
    return {"unet": load_unet(model), "text_encoder": encoder.network}


def original_names(unet: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """diffusers' name of a layer -> the original layout's."""
    entries = unet_entries([f"{layer}.weight" for layer in layers], unet.config)  # type: ignore[arg-type]
    return {each.names[0].removesuffix(".weight"): each.key[len(UNET) : -len(".weight")] for each in entries}


def attention_layers(network: nn.Module) -> list[str]:
    ends = ("to_q", "to_v", "to_out.0", "q_proj", "v_proj", "out_proj")
    return [name for name, each in network.named_modules() if isinstance(each, nn.Linear) and name.endswith(ends)]


@torch.no_grad()
def changes_for(
    network: nn.Module,
    layers: list[str],
    named: Callable[[str], str],
    write: Callable[..., Change],
    alphas: tuple[float, ...] = (1.0, 2.0, 3.0),
) -> tuple[Change, dict[str, Tensor]]:
    """Tensors of a file, and what they add to each layer's weight."""
    generator, modules = torch.Generator().manual_seed(0), dict(network.named_modules())
    tensors, added = Change(), {}
    for number, name in enumerate(layers):
        weight, alpha = modules[name].weight, alphas[number % len(alphas)]
        assert isinstance(weight, Tensor)
        is_conv = weight.ndim == 4
        down = 0.1 * torch.randn(RANK, *weight.shape[1:], generator=generator)
        up = 0.1 * torch.randn(weight.shape[0], RANK, *((1, 1) if is_conv else ()), generator=generator)
        tensors |= write(named(name), down, up, alpha)
        added[name] = (alpha / RANK * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return tensors, added


def save(tensors: Change, file: Path, **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    return file
