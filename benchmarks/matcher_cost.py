"""What the paper's teachers cost per image beside its student, at full size and with random weights.

    python -m benchmarks.matcher_cost --results docs/results/matcher_cost.json
    python -m benchmarks.matcher_cost --no-seconds        # counted operations alone, in seconds

The teachers are SDXL's autoencoder, its UNet up to the block that is read, once per timestep, and DINOv2-B; the student
is one DINOv2-B with its adapters merged. Text is encoded once per prompt and left out. Operations are counted on
torch's meta device; a product of matrices counts as twice its multiplications.

Seconds are the processor's, of one image: the UNet at one timestep, times their number. Its 2.6 billion weights would
take 10 GB, so all weights of one shape share their memory: the same operations on the same shapes.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from d2f_core.correspondence.diffusion_teacher import read_block
from d2f_core.correspondence.student import tokens
from d2f_core.model.architectures import KNOWN
from pipelines.embed_images import DINO_B, SDXL_TURBO

PATCH = 14
TEXT_TOKENS = 77


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    results: Path | None = None
    seconds: bool = True
    threads: int = 1


@dataclass(frozen=True)
class Part:
    """A network, called as it is for one image."""

    name: str
    build: Callable[[], nn.Module]
    call: Callable[[Any], object]
    times: int = 1
    """How often it runs for one image."""


def build_dino() -> nn.Module:
    """DINOv2-B/14 with registers."""
    config = Dinov2WithRegistersConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=518, patch_size=PATCH
    )
    return Dinov2WithRegistersModel(config)


def run_dino(network: Any) -> object:
    return tokens(network, torch.zeros(1, 3, DINO_B.size, DINO_B.size), PATCH)


def build_unet() -> nn.Module:
    network: Any = KNOWN["sdxl"].build_unet()
    network.register_to_config(addition_embed_type=None)
    return network


def run_unet(network: Any) -> object:
    side = SDXL_TURBO.size // KNOWN["sdxl"].pixels_per_latent
    latents = torch.zeros(1, network.config.in_channels, side, side)
    text = torch.zeros(1, TEXT_TOKENS, network.config.cross_attention_dim)
    return read_block(network, SDXL_TURBO.block, latents, torch.zeros(1), encoder_hidden_states=text)


def run_autoencoder(network: Any) -> object:
    return network.encode(torch.zeros(1, 3, SDXL_TURBO.size, SDXL_TURBO.size))


PARTS = (
    Part("SDXL autoencoder", KNOWN["sdxl"].build_vae, run_autoencoder),
    Part("SDXL UNet", build_unet, run_unet, times=len(SDXL_TURBO.timesteps)),
    Part("DINOv2-B", build_dino, run_dino),
)
STUDENT = "DINOv2-B"


def operations(part: Part) -> int:
    """Counted for one image."""
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        part.call(part.build().eval())
    return counter.get_total_flops() * part.times


def seconds(part: Part) -> float:
    """Of the processor for one image."""
    with torch.device("meta"):
        network = part.build().eval()
    share_weights(network)
    with torch.inference_mode():
        started = time.process_time()
        part.call(network)
    return (time.process_time() - started) * part.times


def share_weights(network: nn.Module) -> None:
    """Give random weights to a network on torch's meta device, one tensor to all of a shape."""
    draw, made = torch.Generator().manual_seed(0), {}
    for module in network.modules():
        for group in (module._parameters, module._buffers):
            for name, value in group.items():
                if value is not None and value.is_meta:
                    width = max(1, value[0].numel()) if value.ndim > 1 else 1
                    if (value.shape, value.dtype) not in made:
                        made[value.shape, value.dtype] = torch.randn(value.shape, generator=draw) / width**0.5
                    shared: Any = made[value.shape, value.dtype]
                    group[name] = nn.Parameter(shared, False) if group is module._parameters else shared


def main() -> None:
    config = tyro.cli(CostConfig)
    torch.set_num_threads(config.threads)
    rows = [{"part": part.name, "times": part.times, "tera_operations": operations(part) / 1e12} for part in PARTS]
    if config.seconds:
        for row, part in zip(rows, PARTS, strict=True):
            row["processor_seconds"] = seconds(part)
    measures = [name for name in rows[0] if name not in ("part", "times")]
    student = next(row for row in rows if row["part"] == STUDENT)
    ratio = {name: sum(row[name] for row in rows) / student[name] for name in measures}
    machine = {"cpu": platform.machine(), "torch": torch.__version__, "threads": config.threads}
    text = json.dumps({"machine": machine, "rows": rows, "teachers / student": ratio}, indent=1)
    print(text)
    if config.results:
        config.results.write_text(text + "\n")


if __name__ == "__main__":
    main()
