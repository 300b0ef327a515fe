"""What a base predicts is told from its weights, and a base that says something else is refused."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel

from d2f_core.model.artifact import ArtifactError, describe_model, load_model
from d2f_core.model.autoencoder import load_autoencoder
from d2f_core.model.base import BaseModelError, resolve_base
from d2f_core.model.base_probe import can_be_asked, check_reading, kept_reading, simple_pictures
from d2f_core.model.config import LoraConfig
from d2f_core.model.denoiser import load_unet
from d2f_core.objective.alignment import VelocityField
from d2f_core.objective.loss import LOSSES
from d2f_core.objective.schedule import PREDICTION_TYPES
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import trained

STEPS, BATCH = 150, 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2F_CACHE", str(tmp_path / "cache"))


def say(base: Path, prediction: str) -> None:
    """Make the scheduler config say so."""
    file = base / "scheduler/scheduler_config.json"
    if prediction == "flow_prediction":
        FlowMatchEulerDiscreteScheduler().save_pretrained(base / "scheduler")
    else:
        file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": prediction}))


def train(unet: UNet2DConditionModel, base: Path, kind: str, seed: int) -> UNet2DConditionModel:
    """Train a tiny network for some seconds on latents of pictures that the probe does not use."""
    say(base, kind)
    described = resolve_base(str(base))
    latents = load_autoencoder(described).encode(simple_pictures(256, 16, seed=seed + 100))[0]
    generator = torch.Generator().manual_seed(seed)

    def denoiser(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return unet(x, timestep, encoder_hidden_states=torch.zeros(len(x), 8, 384)).sample

    field = VelocityField(denoiser, described.schedule, kind)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    loss_of = LOSSES["diff2flow" if kind == "flow_prediction" else "diffusion"]
    for _ in range(STEPS):
        data = latents[torch.randint(len(latents), (BATCH,), generator=generator)]
        noise, uniform = torch.randn(data.shape, generator=generator), torch.rand(BATCH, generator=generator)
        loss_of(field, data, noise, uniform).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return unet.eval()


def trained_base(path: Path, kind: str, seed: int = 0) -> Path:
    """A base whose network was trained to predict `kind`, and whose config says so."""
    write_tiny_base(path, seed=seed)
    # A random autoencoder's latents are next to nothing, so they are scaled to the deviation of latents.
    file = path / "vae/config.json"
    deviation = float(load_autoencoder(resolve_base(str(path))).encode(simple_pictures(16, 16, seed=1))[0].std())
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "scaling_factor": config["scaling_factor"] / deviation}))
    unet = UNet2DConditionModel.from_pretrained(path / "unet")
    train(unet, path, kind, seed).save_pretrained(path / "unet")
    return path


def probed(base: Path) -> str:
    resolved = resolve_base(str(base))
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    reading = check_reading(resolved, unet)
    print({kind: round(left, 2) for kind, left in reading.left.items()})
    return reading.best


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: trained_base(tmp_path_factory.mktemp(kind) / "base", kind) for kind in PREDICTION_TYPES}


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_trained_network_is_told_for_what_it_is(bases: dict[str, Path], kind: str) -> None:
    assert probed(bases[kind]) == kind
    load_unet(resolve_base(str(bases[kind])))


@pytest.mark.slow
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("seed", range(1, 21))
def test_twenty_networks_of_each_kind_are_told_right(tmp_path: Path, kind: str, seed: int) -> None:
    base = trained_base(tmp_path / "base", kind, seed)
    assert probed(base) == kind
    reading = kept_reading(resolve_base(str(base)))
    assert reading and [other for other in PREDICTION_TYPES if reading.contradicts(other)] == [
        other for other in PREDICTION_TYPES if other != kind
    ]


def lying(base: Path, said: str, target: Path) -> Path:
    """The same weights, with a scheduler config that says something else."""
    write_tiny_base(target)
    for file in ("unet/diffusion_pytorch_model.safetensors", "vae/config.json"):
        shutil.copyfile(base / file, target / file)
    say(target, said)
    return target


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_base_that_says_something_else_is_refused_and_told_what_to_set(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    for said in set(PREDICTION_TYPES) - {kind}:
        base = resolve_base(str(lying(bases[kind], said, tmp_path / said)))
        way_out = "of the original model" if said == "flow_prediction" else f"prediction_type to '{kind}'"
        with pytest.raises(BaseModelError, match=rf"is read as {said}, .* of {kind} does.*{way_out}"):
            load_unet(base)


def test_what_the_user_says_overrides_with_a_warning(bases: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_unet(resolve_base(str(bases["epsilon"])).read_as("v_prediction"))
    assert "puts out what a network of epsilon does" in caplog.text and "read as it was told" in caplog.text


def test_the_right_reading_is_told_where_the_config_lies(bases: dict[str, Path], tmp_path: Path) -> None:
    """As with a directory that was converted from a rectified-flow file."""
    says_epsilon = str(lying(bases["flow_prediction"], "epsilon", tmp_path / "base"))
    with pytest.raises(BaseModelError, match="--base-prediction"):
        load_model(says_epsilon)
    told = load_model(says_epsilon, base_prediction="flow_prediction")
    assert told.puts_out_velocity and told.sampling.solver == "euler"
    assert describe_model(says_epsilon, base_prediction="flow_prediction").sampling.solver == "euler"
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.8])
    given = {"text_states": torch.zeros(2, 8, 384)}
    honest = load_model(str(bases["flow_prediction"]))
    torch.testing.assert_close(told.velocity_field(x, t, **given), honest.velocity_field(x, t, **given))


def test_a_network_of_random_weights_is_told_nothing_of(tmp_path: Path) -> None:
    base = resolve_base(str(write_tiny_base(tmp_path / "base")))
    reading = check_reading(base, load_unet(base))
    assert not any(reading.contradicts(kind) for kind in PREDICTION_TYPES)


def test_it_is_asked_once_and_what_was_found_is_kept(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base = resolve_base(str(bases["epsilon"]))
    assert kept_reading(base) is None
    found = check_reading(base, load_unet(base))
    assert kept_reading(base) == found
    monkeypatch.setattr("d2f_core.model.base_probe.probe_network", lambda *a: pytest.fail("asked twice"))
    load_unet(base)


def test_the_shipped_base_is_no_false_alarm() -> None:
    base = resolve_base("infra/models/emoji-sd")
    load_unet(base)
    reading = kept_reading(base)
    assert reading and reading.best == "epsilon" and reading.left["epsilon"] < 0.5


def test_a_trained_model_says_itself_how_its_base_is_read(tmp_path: Path) -> None:
    model = trained(write_tiny_base(tmp_path / "base"), tmp_path / "model")
    with pytest.raises(ArtifactError, match="says itself that its base is read as epsilon"):
        load_model(model, base_prediction="v_prediction")


def test_what_was_found_at_other_noise_levels_is_not_taken(bases: dict[str, Path]) -> None:
    base = resolve_base(str(bases["flow_prediction"]))
    load_unet(base)
    told = dataclasses.replace(base, scheduler_config={**base.scheduler_config, "num_train_timesteps": 500})
    assert kept_reading(base) and kept_reading(told) is None


def test_who_only_reads_features_or_has_an_adapter_on_it_does_not_ask(bases: dict[str, Path], tmp_path: Path) -> None:
    says_v = lying(bases["epsilon"], "v_prediction", tmp_path / "base")
    load_unet(resolve_base(str(says_v)), probe=False)
    load_model(trained(says_v, tmp_path / "model", LoraConfig(rank=2), probe=False))
    assert kept_reading(resolve_base(str(says_v))) is None


@pytest.mark.parametrize("field", ["class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"])
def test_a_network_that_takes_more_than_text_is_not_asked(tmp_path: Path, field: str) -> None:
    unet = UNet2DConditionModel.from_pretrained(write_tiny_base(tmp_path / "base") / "unet")
    assert can_be_asked(unet)
    unet.register_to_config(**{field: 8})
    assert not can_be_asked(unet)
    unet.register_to_config(**{field: None, "cross_attention_dim": (384, 384)})
    assert not can_be_asked(unet)
