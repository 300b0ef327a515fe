"""Small trained artifacts: a tiny base whose trained parameters were moved at random."""

from pathlib import Path

import torch

from d2f_core.model.artifact import describe, save_artifact
from d2f_core.model.base import resolve_base
from d2f_core.model.caption_rules import DEFAULT, CaptionRules
from d2f_core.model.config import LoraConfig, SamplingDefaults
from d2f_core.model.denoiser import as_denoiser, load_unet
from d2f_core.model.lora import add_lora
from tests.flow.tiny_base import MAX_LENGTH, TEXT_WIDTH

GENERATOR = torch.Generator().manual_seed(0)
NOISE, X = torch.randn(2, 2, 4, 8, 8, generator=GENERATOR)
STATES, NULL = torch.randn(2, 2, MAX_LENGTH, TEXT_WIDTH, generator=GENERATOR)
TIMESTEP = torch.tensor([10.5, 700.0])


@torch.no_grad()
def trained(
    base: Path,
    target: Path,
    lora: LoraConfig | None = None,
    objective: str = "diff2flow",
    *,
    probe: bool = True,
    captions: CaptionRules = DEFAULT,
    **sampling,
) -> str:
    """An artifact whose trained parameters were moved at random; without `lora` all of them."""
    model = resolve_base(str(base))
    unet = load_unet(model, probe=probe)
    network = unet if lora is None else add_lora(unet, lora)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    method = "full" if lora is None else "lora"
    defaults = SamplingDefaults(**sampling)
    description = describe(
        model, objective=objective, method=method, sampling=defaults, training={}, captions=captions
    )  # fmt: skip
    save_artifact(target, network, description)
    return str(target)


@torch.no_grad()
def output(network) -> torch.Tensor:
    return as_denoiser(network)(X, TIMESTEP, text_states=STATES)
