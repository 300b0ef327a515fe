"""Rectified-flow checkpoints as bases, and what a naively trained model says of its sign."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from d2f_core.flow.generate.sampler import fill_request
from d2f_core.model.artifact import ArtifactError, describe, describe_model, load_model, read_description, save_artifact
from d2f_core.model.base import BaseModelError, resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig, SamplingDefaults
from d2f_core.model.denoiser import load_unet
from d2f_core.model.latent_task import check_networks, check_start
from d2f_core.model.sampling import sample_latents
from d2f_core.model.text_to_image import TextToImage
from d2f_core.objective.alignment import NaiveVelocityField
from d2f_core.objective.loss import LOSSES
from d2f_core.objective.solver import integrate, uniform_times
from d2f_core.objective.time_sampling import NaiveTarget
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import NOISE, NULL, STATES, X

T = torch.tensor([0.1, 0.8])


def write_flow_base(path: Path, shift: float = 3.0) -> Path:
    write_tiny_base(path)
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(path / "scheduler")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flow_base(tmp_path_factory.mktemp("flow") / "base")


def save(base: Path, target: Path, objective: str = "diff2flow", naive_target: NaiveTarget = "noise_minus_data") -> str:
    described = describe(
        resolve_base(str(base)),
        objective=objective,
        naive_target=naive_target,
        method="full",
        sampling=SamplingDefaults(),
        training={},
    )
    save_artifact(target, load_unet(resolve_base(str(base))), described)
    return str(target)


def test_it_is_sampled_by_euler_at_the_shift_that_its_scheduler_says(base: Path) -> None:
    model = load_model(str(base))
    assert (model.sampling.solver, model.sampling.shift) == ("euler", 3.0)
    out = model.denoiser(X, 1000 * (1 - T), text_states=STATES)
    torch.testing.assert_close(model.velocity_field(X, T, text_states=STATES), -out)
    latents, evaluations = sample_latents(model, NOISE, STATES, NULL, solver="euler", steps=4, guidance=1.0, shift=3.0)
    expected, _ = integrate(lambda x, t: model.velocity_field(x, t, text_states=STATES), NOISE, uniform_times(4, 3.0))
    assert torch.equal(latents, expected) and evaluations == 4


@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
def test_no_diffusion_sampler_takes_it(base: Path, tmp_path: Path, solver: str) -> None:
    naive = save(write_tiny_base(tmp_path / "base"), tmp_path / "naive", "flow_matching")
    for model in (load_model(str(base)), load_model(naive)):
        for draw in (
            lambda m: sample_latents(m, NOISE, STATES, NULL, solver=solver, steps=2, guidance=1.0),
            lambda m: fill_request(m, prompt="a", solver=solver),
        ):
            with pytest.raises(ValueError, match=rf"solver='{re.escape(solver)}'.*puts out velocities.*Use euler"):
                draw(model)


def task(base: Path, **more) -> TextToImage:
    chosen = ModelConfig(base=str(base), method="lora", lora=LoraConfig(rank=2), **more)
    return TextToImage(resolve_base(str(base)), chosen, seed=0, dtype=torch.float32, device="cpu")


def test_diff2flow_trains_it_as_plain_flow_matching(base: Path) -> None:
    trained = task(base)
    uniform = torch.tensor([0.2, 0.9])
    batch = {"data": X, "noise": NOISE, "uniform": uniform, "text_states": STATES}
    loss = trained.loss(trained.module, batch)
    field = NaiveVelocityField(trained.model(trained.module).denoiser, trained.base.schedule)
    t = uniform[:, None, None, None]
    velocity = field((1 - t) * NOISE + t * X, uniform, text_states=STATES)
    torch.testing.assert_close(loss, (velocity - (X - NOISE)).square().flatten(1).mean(1))
    loss.sum().backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained.module.parameters())


def test_what_would_turn_it_round_is_refused(base: Path) -> None:
    chosen = ModelConfig(base=str(base), lora=LoraConfig(rank=2))
    check_networks(resolve_base(str(base)), chosen)
    check_networks(resolve_base(str(base)), replace(chosen, objective="flow_matching"))
    for wrong in ({"objective": "diffusion"}, {"objective": "flow_matching", "naive_target": "data_minus_noise"}):
        with pytest.raises(BaseModelError, match=r"is a flow model .*Use objective='diff2flow'"):
            check_networks(resolve_base(str(base)), replace(chosen, **wrong))


def test_a_model_on_it_says_so_and_is_read_again(base: Path, tmp_path: Path) -> None:
    model = save(base, tmp_path / "model")
    description = read_description(tmp_path / "model")
    assert (description["format_version"], description["prediction_type"]) == (2, "flow_prediction")
    loaded = load_model(model)
    torch.testing.assert_close(
        loaded.velocity_field(X, T, text_states=STATES), load_model(str(base)).velocity_field(X, T, text_states=STATES)
    )
    assert describe_model(model).puts_out_velocity


@pytest.mark.parametrize(("target", "version"), [("noise_minus_data", 2), ("data_minus_noise", 1)])
def test_a_naive_model_carries_its_sign(tmp_path: Path, target: NaiveTarget, version: int) -> None:
    base = write_tiny_base(tmp_path / "base")
    model = save(base, tmp_path / "model", "flow_matching", target)
    written = json.loads((tmp_path / "model/diff2flow.json").read_text())
    assert written["format_version"] == version and ("naive_target" in written) == (version == 2)
    loaded = load_model(model)
    out = loaded.denoiser(X, 1000 * (1 - T), text_states=STATES)
    expected = -out if target == "noise_minus_data" else out
    torch.testing.assert_close(loaded.velocity_field(X, T, text_states=STATES), expected)
    field = loaded.velocity_field
    chosen = task(base, objective="flow_matching", naive_target=target)
    assert chosen.model(chosen.module).velocity_field.target == field.target == target  # type: ignore[union-attr]


def test_each_sign_is_trained_by_its_own_loss(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    batch = {"data": X, "noise": NOISE, "uniform": T, "text_states": STATES}
    losses = {}
    for target in ("noise_minus_data", "data_minus_noise"):
        trained = task(base, objective="flow_matching", naive_target=target)
        losses[target] = trained.loss(trained.module, batch)
        naive = LOSSES["flow_matching"]
        field = load_model(str(base)).velocity_field
        torch.testing.assert_close(losses[target], naive(field, X, NOISE, T, target=target, text_states=STATES))
    assert not torch.allclose(losses["noise_minus_data"], losses["data_minus_noise"])


def test_a_diffusion_models_description_is_written_as_older_releases_read_it(tmp_path: Path) -> None:
    save(write_tiny_base(tmp_path / "base"), tmp_path / "model")
    written = json.loads((tmp_path / "model/diff2flow.json").read_text())
    assert written["format_version"] == 1 and "naive_target" not in written


def test_a_format_of_the_future_is_refused(base: Path, tmp_path: Path) -> None:
    save(base, tmp_path / "model")
    file = tmp_path / "model/diff2flow.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 4}))
    with pytest.raises(ArtifactError, match="format_version=4; this release reads 1 to 3"):
        read_description(tmp_path / "model")


def test_a_training_starts_only_from_a_model_that_puts_out_the_same(base: Path, tmp_path: Path) -> None:
    plain = write_tiny_base(tmp_path / "base")
    naive = save(plain, tmp_path / "naive", "flow_matching")
    chosen = ModelConfig(base=str(plain), method="full", start=naive, objective="flow_matching")
    check_start(resolve_base(str(plain)), chosen)
    for wrong in ({"objective": "diff2flow"}, {"naive_target": "data_minus_noise"}):
        with pytest.raises(ValueError, match=r"puts out noise_minus_data .*would read as"):
            check_start(resolve_base(str(plain)), replace(chosen, **wrong))
    on_flow = ModelConfig(base=str(base), method="full", start=save(base, tmp_path / "flow", "flow_matching"))
    check_start(resolve_base(str(base)), on_flow)
