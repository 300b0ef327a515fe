"""SD 1.5, SD 2.1 and SDXL are called alike, wrong conditions are refused, and new input channels change nothing."""

import copy

import pytest
import torch
from torch import nn

from d2f_core.model.config import LoraConfig
from d2f_core.model.denoiser import ConditionError, as_denoiser, extend_input_channels
from d2f_core.model.lora import add_lora
from d2f_core.objective.alignment import VelocityField
from d2f_core.objective.guidance import guided
from d2f_core.objective.schedule import NoiseSchedule
from tests.model.architectures import NAMES, full_unet, tiny_condition, tiny_inputs, tiny_unet

X, TIMESTEP = tiny_inputs()
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Engine(nn.Module):
    """As a training engine: a module around the module, with a `config` of its own that says nothing of the UNet."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.config = {"train_micro_batch_size_per_gpu": 1}

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(("name", "millions"), [("sd15", 859.5), ("sd21", 865.9), ("sdxl", 2567.5)])
def test_the_architectures_have_the_published_sizes(name, millions):
    assert sum(p.numel() for p in full_unet(name).parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_denoiser_is_the_network_with_its_conditions_named(name):
    unet, condition = tiny_unet(name), tiny_condition(name)
    additions = {}
    if name == "sdxl":
        additions = {"text_embeds": condition["pooled_text"], "time_ids": condition["time_ids"]}
    expected = unet(X, TIMESTEP, condition["text_states"], added_cond_kwargs=additions).sample
    assert torch.equal(as_denoiser(unet)(X, TIMESTEP, **condition), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrapped", ["engine", "adapter", "engine around adapter", "function"])
def test_a_denoiser_works_through_what_is_around_the_network(name, wrapped):
    unet, condition = tiny_unet(name).requires_grad_(False), tiny_condition(name)
    expected = as_denoiser(unet)(X, TIMESTEP, **condition)
    network = add_lora(unet, LoraConfig(rank=2)) if "adapter" in wrapped else unet
    if "engine" in wrapped:
        network = Engine(network)
    if wrapped == "function":
        inner = network

        def network(*args, **kwargs):
            return inner(*args, **kwargs)

    assert torch.equal(as_denoiser(network)(X, TIMESTEP, **condition), expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_condition_reaches_the_output(name):
    unet, condition = tiny_unet(name), tiny_condition(name)
    condition = {key: value.requires_grad_(True) for key, value in condition.items()}
    as_denoiser(unet)(X, TIMESTEP, **condition).square().sum().backward()
    for key, value in condition.items():
        assert value.grad is not None and value.grad.abs().max() > 0, key


@torch.no_grad()
def test_sizes_in_pixels_are_not_rounded_with_the_network():
    """In bfloat16, 1023 would become 1024; the embedding of the sizes is computed from the exact numbers."""
    unet, condition = tiny_unet("sdxl").to(torch.bfloat16), tiny_condition("sdxl")
    seen = []
    unet.add_time_proj.register_forward_hook(lambda _module, args, _out: seen.append(args[0]))
    assert as_denoiser(unet, torch.bfloat16)(X, TIMESTEP, **condition).dtype == torch.bfloat16
    assert torch.equal(seen[0], condition["time_ids"].flatten())


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "prediction_type"), [("sd15", "epsilon"), ("sd21", "v_prediction"), ("sdxl", "epsilon")]
)
def test_conditions_pass_through_the_velocity_field_and_guidance(name, prediction_type):
    field = VelocityField(as_denoiser(tiny_unet(name)), NoiseSchedule.from_scheduler_config(SCHEDULE), prediction_type)
    condition, null = tiny_condition(name), tiny_condition(name, seed=7)
    t = torch.tensor([0.2, 0.9])
    conditional, unconditional = field(X, t, **condition), field(X, t, **null)
    velocity = guided(field, 3.0, condition, null)(X, t)
    torch.testing.assert_close(velocity, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("missing", ["pooled_text", "time_ids"])
def test_a_missing_condition_is_refused(missing):
    condition = tiny_condition("sdxl")
    del condition[missing]
    with pytest.raises(ConditionError, match=rf"{missing} is missing.* needs pooled_text .*Add {missing}"):
        as_denoiser(Engine(tiny_unet("sdxl")))(X, TIMESTEP, **condition)


@pytest.mark.parametrize("name", ["sd15", "sd21"])
@pytest.mark.parametrize("unneeded", ["pooled_text", "time_ids"])
def test_a_condition_that_the_network_cannot_take_is_refused(name, unneeded):
    condition = tiny_condition(name) | {unneeded: tiny_condition("sdxl")[unneeded]}
    with pytest.raises(ConditionError, match=rf"{unneeded} of shape \(2, .*Remove {unneeded}"):
        as_denoiser(tiny_unet(name))(X, TIMESTEP, **condition)


@pytest.mark.parametrize(
    "change", [{"pooled_text": torch.zeros(2, 23)}, {"time_ids": torch.zeros(2, 5)}, {"time_ids": torch.zeros(1, 6)}]
)
def test_conditions_of_the_wrong_shape_are_refused(change):
    with pytest.raises(ConditionError, match="Give 6 time ids and a pooled text of width 24"):
        as_denoiser(tiny_unet("sdxl"))(X, TIMESTEP, **tiny_condition("sdxl") | change)


def test_a_network_with_other_conditions_is_refused_at_once():
    unet = tiny_unet("sd15")
    unet.register_to_config(addition_embed_type="image")
    with pytest.raises(ConditionError, match=r"addition_embed_type='image'.* Use a base model of one of these"):
        as_denoiser(unet)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extra", [1, 4])
def test_new_input_channels_change_nothing_when_they_are_zero_and_are_read_like_the_old_ones(name, extra):
    unet, condition = tiny_unet(name), tiny_condition(name)
    expected = as_denoiser(unet)(X, TIMESTEP, **condition)
    wider = extend_input_channels(tiny_unet(name), extra)
    assert wider.config["in_channels"] == 4 + extra == wider.conv_in.in_channels
    denoiser = as_denoiser(wider)
    assert torch.equal(denoiser(X, TIMESTEP, joined_latents=torch.zeros(2, extra, 8, 8), **condition), expected)
    assert torch.equal(wider.conv_in.weight[:, 4:], unet.conv_in.weight[:, :extra])
    if extra == 4:  # half of the input in the old channels and half in the new ones
        halves = denoiser(X / 2, TIMESTEP, joined_latents=X / 2, **condition)
        torch.testing.assert_close(halves, expected, rtol=0, atol=1e-5)


def test_new_input_channels_can_be_learned_and_draw_no_random_numbers():
    unet = tiny_unet("sd21")
    state = torch.get_rng_state()
    extend_input_channels(unet, 4)
    assert torch.equal(torch.get_rng_state(), state)
    joined = torch.randn(2, 4, 8, 8)
    as_denoiser(unet)(X, TIMESTEP, joined_latents=joined, **tiny_condition("sd21")).square().sum().backward()
    gradient = unet.conv_in.weight.grad
    assert gradient is not None and gradient[:, 4:].abs().max() > 0


@torch.no_grad()
def test_an_extended_network_is_saved_and_loaded_as_diffusers_does(tmp_path):
    unet = extend_input_channels(tiny_unet("sd15"), 4)
    unet.conv_in.weight.add_(0.1)
    unet.save_pretrained(tmp_path)
    condition = tiny_condition("sd15") | {"joined_latents": torch.randn(2, 4, 8, 8)}
    # A copy: convolutions round by where their weights lie in memory, and those of a mapped file lie unaligned.
    loaded = copy.deepcopy(type(unet).from_pretrained(tmp_path))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in unet.state_dict().items())
    assert torch.equal(as_denoiser(loaded)(X, TIMESTEP, **condition), as_denoiser(unet)(X, TIMESTEP, **condition))


def test_joined_latents_must_fill_the_input_exactly():
    condition, joined = tiny_condition("sd15"), torch.zeros(2, 4, 8, 8)
    with pytest.raises(ConditionError, match=r"were given to a UNet whose 4 input channels x_dm fills"):
        as_denoiser(tiny_unet("sd15"))(X, TIMESTEP, joined_latents=joined, **condition)
    denoiser = as_denoiser(extend_input_channels(tiny_unet("sd15"), 4))
    with pytest.raises(ConditionError, match="joined_latents are missing, but the UNet has 8 input channels"):
        denoiser(X, TIMESTEP, **condition)
    for wrong in (joined[:, :3], joined[:1], joined[..., :4]):
        with pytest.raises(ConditionError, match=r"needs \(2, 4, 8, 8\)"):
            denoiser(X, TIMESTEP, joined_latents=wrong, **condition)


def test_input_channels_are_extended_before_adapters_and_by_at_least_one():
    with pytest.raises(ValueError, match="extra=0 input channels: must be at least 1"):
        extend_input_channels(tiny_unet("sd15"), 0)
    unet = tiny_unet("sd15")
    add_lora(unet, LoraConfig(preset="small"))
    with pytest.raises(ValueError, match="before adding adapters"):
        extend_input_channels(unet, 4)
