"""A trained model is refused with another base, and samples as it says."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from d2f_core.flow.generate.sampler import fill_request
from d2f_core.model.artifact import ArtifactError, describe, load_model, load_weights, save_artifact
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import BaseModelError, resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig, SamplingDefaults
from d2f_core.model.denoiser import load_unet
from d2f_core.model.latent_task import build_network
from d2f_core.model.sampling import sample_latents
from d2f_core.model.text_encoder import load_text_encoder
from d2f_core.objective.schedule import ScheduleError
from d2f_core.objective.solver import NonFiniteStateError
from tests.flow.tiny_base import write_tiny_base

NOISE, STATES, NULL = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 384), torch.zeros(2, 8, 384)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


def saved(directory: Path, target: Path, method: str) -> Path:
    base = resolve_base(str(directory))
    network = build_network(base, ModelConfig(base=str(directory), method=method, lora=LoraConfig(rank=2)), 0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    sampling = SamplingDefaults(solver="heun", steps=3, guidance=1.5)
    save_artifact(target, network, describe(base, objective="diff2flow", method=method, sampling=sampling, training={}))
    return target


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_artifact_carries_how_to_sample_it_and_is_safetensors_and_json_only(directory, tmp_path, method):
    model = load_model(str(saved(directory, tmp_path / "model", method)))
    assert model.sampling == SamplingDefaults(solver="heun", steps=3, guidance=1.5)
    assert {file.suffix for file in (tmp_path / "model").rglob("*") if file.is_file()} <= {
        ".json",
        ".safetensors",
        ".md",
    }
    latents, evaluations = sample_latents(model, NOISE, STATES, NULL, solver="heun", steps=3, guidance=1.5)
    assert latents.isfinite().all() and evaluations == 6
    base_latents, _ = sample_latents(
        load_model(str(directory)), NOISE, STATES, NULL, solver="heun", steps=3, guidance=1.5
    )
    assert (latents - base_latents).abs().max() > 1e-3


def test_a_model_made_for_another_size_carries_it_and_its_base_does_not(directory, tmp_path):
    base = resolve_base(str(directory))
    sampling, target = SamplingDefaults(resolution=24), tmp_path / "model"
    save_artifact(target, load_unet(base), describe(base, objective="diff2flow", method="full", sampling=sampling,
                                                    training={}))  # fmt: skip
    sizes = [
        (r.height, r.width) for r in (fill_request(load_model(str(uri)), prompt="a") for uri in (target, directory))
    ]
    assert sizes == [(24, 24), base.default_size] and base.default_size != (24, 24)


def test_another_base_is_refused_with_both_hashes(directory, tmp_path):
    other = write_tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError, match=r"trained on a base with sha256 [0-9a-f]{64}, but .* has [0-9a-f]{64}"):
        load_model(str(saved(directory, tmp_path / "model", "lora")), base_uri=str(other))


@pytest.mark.parametrize(("solver", "kind"), [("ddim", DDIMScheduler), ("dpm++", DPMSolverMultistepScheduler)])
def test_a_base_is_sampled_as_by_diffusers(directory, solver, kind):
    model = load_model(str(directory))
    ours, evaluations = sample_latents(model, NOISE, STATES, NULL, solver=solver, steps=5, guidance=1.0)
    scheduler = kind.from_config(dict(model.base.scheduler_config), timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    x = NOISE
    for timestep in scheduler.timesteps:
        prediction = model.denoiser(x, timestep.expand(2).float(), text_states=STATES)
        x = scheduler.step(prediction, int(timestep), x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)
    assert evaluations == 5


@pytest.mark.parametrize("solver", ["ddim", "dpm++", "euler"])
def test_a_network_that_fails_is_named_with_its_samples(directory, solver):
    broken = STATES.clone()
    broken[1] = torch.nan
    with pytest.raises(NonFiniteStateError, match=r"samples \[1\] is not finite at"):
        sample_latents(load_model(str(directory)), NOISE, broken, NULL, solver=solver, steps=2, guidance=1.0)


@pytest.mark.parametrize("change", [{"shift": float("nan")}, {"shift": float("inf")}, {"guidance": float("nan")}])
def test_settings_that_are_no_numbers_are_refused(directory, change):
    settings = {"solver": "euler", "steps": 2, "guidance": 1.0} | change
    with pytest.raises(ValueError, match="must be a number"):
        sample_latents(load_model(str(directory)), NOISE, STATES, NULL, **settings)


def test_weights_that_do_not_fit_are_refused(directory):
    network = build_network(resolve_base(str(directory)), ModelConfig(base=str(directory), method="full"), 0)
    with pytest.raises(ArtifactError, match=r"unknown \['no.such'\], missing \['"):
        load_weights(network, {"no.such": torch.zeros(1)})


def test_a_base_whose_weights_are_pickles_is_refused(tmp_path):
    base = write_tiny_base(tmp_path)
    (base / "text_encoder/reference.json").unlink()
    (base / "text_encoder/config.json").write_text("{}")
    for part in ("unet", "vae", "text_encoder"):
        for file in (base / part).glob("*.safetensors"):
            file.unlink()
        (base / part / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    model = resolve_base(str(base))
    for load in (load_unet, load_autoencoder, load_text_encoder):
        with pytest.raises(BaseModelError, match="has no safetensors in "):
            load(model)


def test_a_base_without_scheduler_config_is_refused(tmp_path):
    (write_tiny_base(tmp_path) / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(BaseModelError, match=r"has no scheduler/scheduler_config.json"):
        resolve_base(str(tmp_path))


def test_a_base_that_is_not_there_is_refused():
    with pytest.raises(BaseModelError, match="No directory"):
        resolve_base("/no/such/model")


def test_epsilon_with_zero_terminal_snr_is_refused_when_the_base_is_read(tmp_path):
    file = write_tiny_base(tmp_path) / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rescale_betas_zero_snr": True}))
    with pytest.raises(ScheduleError, match="Use a v_prediction base"):
        resolve_base(str(tmp_path))
