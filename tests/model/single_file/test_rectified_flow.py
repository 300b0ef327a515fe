"""A rectified-flow file, called as ComfyUI calls it, samples what this project samples with the model itself."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from d2f_core.model.artifact import describe, load_model, save_artifact
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig, SamplingDefaults
from d2f_core.model.denoiser import load_unet
from d2f_core.model.lora import add_lora
from d2f_core.model.sampling import sample_latents
from d2f_core.model.single_file.keys import LayoutError
from d2f_core.model.single_file.write import write_checkpoint_file
from tests.model.architectures import tiny_condition
from tests.model.single_file.files import metadata_of, put_configs_beside
from tests.model.tiny_sd import write_tiny

NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
CONDITION = tiny_condition("sd15")
Model = tuple[str, Path]
"""URI of a model, and its base."""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("flow") / "base", "sd15")


@torch.no_grad()
def trained(base: Path, target: Path, objective: str, lora: bool = False, **fields) -> Model:
    """An artifact whose trained parameters were moved at random."""
    known = resolve_base(str(base))
    network = add_lora(load_unet(known), LoraConfig(rank=2)) if lora else load_unet(known)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    method = "lora" if lora else "full"
    settings = SamplingDefaults(steps=8, shift=3.0)
    described = describe(known, objective=objective, method=method, sampling=settings, training={}, **fields)
    save_artifact(target, network, described)
    return str(target), base


def naive(base: Path, home: Path) -> Model:
    return trained(base, home / "model", "flow_matching", naive_target="noise_minus_data")


def as_published(base: Path, home: Path) -> Model:
    return trained(base, home / "model", "flow_matching", lora=True, naive_target="data_minus_noise")


def flow_base(base: Path, home: Path) -> Model:
    write_tiny(home / "flow", "sd15")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(home / "flow/scheduler")
    return str(home / "flow"), home / "flow"


def on_a_flow_base(base: Path, home: Path) -> Model:
    return trained(flow_base(base, home)[1], home / "model", "diff2flow", lora=True)


@torch.no_grad()
def as_comfyui(network: Callable[..., Tensor], noise: Tensor, steps: int, shift: float) -> Tensor:
    """ComfyUI's Euler sampler on its `simple` schedule, with the node ModelSamplingSD3: sigma 1 is noise."""
    grid = torch.arange(1, 1001, dtype=torch.float64) / 1000
    table = shift * grid / (1 + (shift - 1) * grid)
    sigmas = [float(table[-(1 + step * 1000 // steps)]) for step in range(steps)] + [0.0]
    x = sigmas[0] * noise
    for sigma, following in itertools.pairwise(sigmas):
        times = torch.full((len(x),), 1000 * sigma)
        denoised = x - sigma * network(x, times, encoder_hidden_states=CONDITION["text_states"]).sample
        x = x + (following - sigma) * (x - denoised) / sigma
    return x


@pytest.mark.parametrize("make", [naive, as_published, flow_base, on_a_flow_base])
def test_comfyui_samples_what_we_sample(base: Path, tmp_path: Path, make: Callable[[Path, Path], Model]):
    (uri, own_base), file = make(base, tmp_path), tmp_path / "one.safetensors"
    assert write_checkpoint_file(uri, str(file), dtype="float32").prediction == "sd3"
    put_configs_beside(own_base, file, scheduler=False)
    model, read = load_model(uri), load_model(str(file))
    assert read.base.is_flow and (read.sampling.solver, read.sampling.shift) == ("euler", 3.0)
    for steps, shift in ((4, 6.0), (10, 1.0), (25, 3.0)):
        settings = {"solver": "euler", "steps": steps, "guidance": 1.0, "shift": shift}
        ours, _ = sample_latents(model, NOISE, CONDITION, CONDITION, **settings)
        theirs = as_comfyui(read.network, NOISE, steps, shift)
        assert (theirs - ours).abs().max() < 4e-7 * ours.abs().max()
    again, _ = sample_latents(read, NOISE, CONDITION, CONDITION, **settings)
    assert (again - ours).abs().max() < 4e-7 * ours.abs().max()


def test_its_metadata_make_programs_sample_a_flow(base: Path, tmp_path: Path):
    uri, _ = naive(base, tmp_path)
    write_checkpoint_file(uri, str(tmp_path / "one.safetensors"), title="My model")
    told = metadata_of(tmp_path / "one.safetensors")
    assert told["modelspec.prediction_type"] == told["prediction_type"] == "sd3"
    assert told["modelspec.title"] == "My model" and told["modelspec.architecture"] == "stable-diffusion-v1"
    assert told["resolution"] == told["modelspec.resolution"] == "64x64"
    assert told["d2f_prediction_type"] == "flow_prediction" and told["d2f_objective"] == "flow_matching"
    assert (told["d2f_steps"], told["d2f_shift"]) == ("8", "3.0") and told["d2f_sampler"] == "euler in flow time"
    assert json.loads(told["d2f_schedule"]) == {"num_train_timesteps": 1000, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(("objective", "lora"), [("diff2flow", True), ("diffusion", False)])
def test_a_network_of_the_bases_kind_is_told_as_such(base: Path, tmp_path: Path, objective: str, lora: bool):
    uri, _ = trained(base, tmp_path / "model", objective, lora)
    file = tmp_path / "one.safetensors"
    assert write_checkpoint_file(uri, str(file), dtype="float32").prediction == "epsilon"
    put_configs_beside(base, file)
    told = metadata_of(file)
    assert (told["d2f_objective"], told["d2f_prediction_type"]) == (objective, "epsilon")
    merged, found = load_model(uri).network.state_dict(), load_model(str(file)).network.state_dict()
    assert merged.keys() == found.keys() and all(torch.equal(merged[name], found[name]) for name in merged)


def test_a_flow_of_other_timesteps_is_refused(base: Path, tmp_path: Path):
    _, path = flow_base(base, tmp_path)
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=500).save_pretrained(path / "scheduler")
    with pytest.raises(LayoutError, match="has 500 timesteps, and programs ask at 1000"):
        write_checkpoint_file(str(path), str(tmp_path / "one.safetensors"))
    assert not (tmp_path / "one.safetensors").exists()
