"""LoRA changes nothing at first, trains only its adapters, and survives a round trip."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from d2f_core.model.artifact import describe, load_model, save_artifact
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig, ModelConfig, SamplingDefaults
from d2f_core.model.denoiser import as_denoiser, extend_input_channels, load_unet
from d2f_core.model.latent_task import build_network
from d2f_core.model.lora import AdapterError, add_lora, load_lora, load_lora_in_diffusers, preset_ranks
from tests.flow.tiny_base import write_tiny_base
from tests.model.architectures import NAMES, full_unet, tiny_condition, tiny_inputs, tiny_unet

X, TIMESTEP, STATES = torch.randn(2, 4, 8, 8), torch.tensor([10.5, 700.0]), torch.randn(2, 8, 384)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return resolve_base(str(write_tiny_base(tmp_path_factory.mktemp("base"))))


@torch.no_grad()
def output(network):
    return as_denoiser(network)(X, TIMESTEP, text_states=STATES)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_an_adapter_at_init_changes_exactly_nothing(base, targets):
    before = output(load_unet(base))
    assert (output(add_lora(load_unet(base), LoraConfig(rank=4, targets=targets))) - before).abs().max() == 0


def test_only_adapters_are_trained_and_convolutions_have_them(base):
    network = add_lora(load_unet(base), LoraConfig(rank=4))
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    for part in (
        "conv_in",
        "conv_out",
        "resnets.0.conv1",
        "time_emb_proj",
        "attn1.to_q",
        "attn2.to_out.0",
        "ff.net.0.proj",
    ):
        assert any(f".{part}.lora_A" in name for name in trained), part


def test_a_saved_adapter_gives_the_same_output_when_loaded_and_merged(base, tmp_path):
    network = add_lora(load_unet(base), LoraConfig(rank=4, alpha=6.0))
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    expected = output(network)
    assert (expected - output(load_unet(base))).abs().max() > 1e-3
    network.save_pretrained(tmp_path)
    torch.testing.assert_close(output(load_lora(load_unet(base), tmp_path)), expected, rtol=1e-5, atol=1e-5)


def test_rank_zero_is_refused():
    with pytest.raises(ValueError, match="lora rank=0"):
        LoraConfig(rank=0)


PRESETS = ("base", "small", "attention")
ALL = pytest.mark.parametrize("preset", PRESETS)
EVERY_NETWORK = pytest.mark.parametrize("name", NAMES)


@torch.no_grad()
def predict(network, name, **more):
    x, timestep = tiny_inputs()
    return as_denoiser(network)(x, timestep, **tiny_condition(name), **more)


def trained(name, preset, extra=0):
    """A network of which all that is trained has moved, as after a training."""
    unet = extend_input_channels(tiny_unet(name), extra) if extra else tiny_unet(name)
    network = add_lora(unet, LoraConfig(preset=preset))
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize(("preset", "millions"), [("base", 207.5), ("small", 64.7), ("attention", 10.1)])
def test_a_preset_trains_as_many_parameters_of_sd21_as_the_paper(preset, millions):
    with torch.device("meta"):
        network = add_lora(full_unet("sd21"), LoraConfig(preset=preset))
    count = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_base_has_a_fifth_of_the_wider_side_as_rank_rounded_up():
    ranks = preset_ranks(full_unet("sd21"), "base")
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert ranks[f"{block}.attn1.to_q"] == 64  # 320 -> 320
    assert ranks[f"{block}.attn2.to_k"] == 205  # 1024 -> 320
    assert ranks["up_blocks.0.resnets.0.conv1"] == ranks["up_blocks.0.resnets.0.conv_shortcut"] == 512  # 2560 -> 1280
    assert not any(part in name for name in ranks for part in ("to_out", "ff.", "proj", "conv_in", "conv_out"))


@ALL
def test_transformer_projections_are_adapted_as_what_they_are(preset):
    """Convolutions in SD 1.5, linear layers, which go with the feed-forward ones, in SD 2.1."""
    adapted = {name: any("proj_in" in key for key in preset_ranks(tiny_unet(name), preset)) for name in NAMES}
    assert adapted == {"sd15": preset != "attention", "sd21": preset == "small", "sdxl": preset == "small"}


@EVERY_NETWORK
@ALL
def test_a_preset_at_init_changes_nothing_to_the_last_bit(name, preset):
    x, timestep = tiny_inputs()
    before = predict(tiny_unet(name).requires_grad_(False), name)
    network = add_lora(tiny_unet(name), LoraConfig(preset=preset))
    assert torch.equal(predict(network, name), before)
    assert torch.equal(as_denoiser(network)(x, timestep, **tiny_condition(name)), before)  # as a training computes it


@ALL
def test_a_preset_trains_its_adapters_and_ends_and_all_of_them(preset):
    network = add_lora(tiny_unet("sd21"), LoraConfig(preset=preset))
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=0.01)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    x, timestep = tiny_inputs(side=16)  # attention over the single place that 8 leaves at the bottom trains no q, k
    for _ in range(2):  # A has no gradient while B is zero
        optimizer.zero_grad()
        as_denoiser(network)(x, timestep, **tiny_condition("sd21")).square().mean().backward()
        optimizer.step()
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    ends = {name.split(".")[2] for name in moved if "modules_to_save" in name}
    assert ends == (set() if preset == "attention" else {"conv_in", "conv_out"})
    with network.disable_adapter():
        assert torch.equal(predict(network, "sd21"), predict(tiny_unet("sd21").requires_grad_(False), "sd21"))


@EVERY_NETWORK
@ALL
def test_a_saved_preset_gives_the_same_output_merged_through_peft_and_through_diffusers(name, preset, tmp_path):
    network = trained(name, preset)
    expected = predict(network, name)
    assert (expected - predict(tiny_unet(name), name)).abs().max() > 1e-2
    network.save_pretrained(tmp_path)
    assert torch.equal(predict(PeftModel.from_pretrained(tiny_unet(name), tmp_path), name), expected)
    loaded = load_lora_in_diffusers(tiny_unet(name).requires_grad_(False), tmp_path)
    assert torch.equal(predict(loaded, name), expected)
    torch.testing.assert_close(predict(load_lora(tiny_unet(name), tmp_path), name), expected, rtol=1e-5, atol=1e-5)


def test_diffusers_switches_adapters_off_but_leaves_the_trained_ends(tmp_path):
    trained("sd21", "small").save_pretrained(tmp_path)
    unet = tiny_unet("sd21").requires_grad_(False)
    before = predict(unet, "sd21")
    load_lora_in_diffusers(unet, tmp_path)
    unet.disable_lora()
    assert (predict(unet, "sd21") - before).abs().max() > 1e-2
    for end in (unet.conv_in, unet.conv_out):
        end.enable_adapters(False)
    assert torch.equal(predict(unet, "sd21"), before)


def test_diffusers_keeps_a_scale_other_than_one(base, tmp_path):
    network = add_lora(load_unet(base), LoraConfig(rank=4, alpha=6.0))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    network.save_pretrained(tmp_path)
    torch.testing.assert_close(
        output(load_lora_in_diffusers(load_unet(base), tmp_path)), output(network), rtol=1e-5, atol=1e-5
    )


def test_an_adapter_is_saved_in_pefts_format_and_in_a_fixed_order(tmp_path):
    network = trained("sd21", "base")
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["modules_to_save"] == ["conv_in", "conv_out"]
    assert config["rank_pattern"] == config["alpha_pattern"] and len(set(config["rank_pattern"].values())) > 1
    assert not any(isinstance(value, set) for value in network.peft_config["default"].to_dict().values())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {"base_model.model.conv_in.weight", "base_model.model.conv_out.bias"} < weights.keys()
    assert all(".lora_" in name or ".conv_in." in name or ".conv_out." in name for name in weights)


@pytest.mark.parametrize("load", [load_lora, load_lora_in_diffusers])
@pytest.mark.parametrize("part", ["conv1.lora_A.weight", "attn2.to_k.lora_B.weight"])
def test_an_adapter_with_a_missing_or_unknown_tensor_is_refused(load, part, tmp_path):
    trained("sd21", "small").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith(part))
    save_file({key: value for key, value in weights.items() if key != name}, file)
    with pytest.raises(AdapterError, match=f"{name.removeprefix('base_model.model.')}.*Load it into the base"):
        load(tiny_unet("sd21"), tmp_path)
    save_file(weights | {name.replace("down_blocks.0", "down_blocks.9"): weights[name].clone()}, file)
    with pytest.raises(AdapterError, match=r"blocks\.9.*Load it into the base"):
        load(tiny_unet("sd21"), tmp_path)


@pytest.mark.parametrize("load", [load_lora, load_lora_in_diffusers])
def test_an_adapter_without_the_ends_that_it_trained_is_refused(load, tmp_path):
    trained("sd21", "small").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "conv_out.bias" not in key}, file)
    with pytest.raises(AdapterError, match=r"says that conv_out was trained, but lacks \['conv_out.bias'\]"):
        load(tiny_unet("sd21"), tmp_path)


@pytest.mark.parametrize("load", [load_lora, load_lora_in_diffusers])
def test_an_adapter_trained_with_more_input_channels_brings_them_along(load, tmp_path):
    network = trained("sd21", "base", extra=4)
    joined = torch.randn(2, 4, 8, 8)
    network.save_pretrained(tmp_path)
    expected = predict(network, "sd21", joined_latents=joined)
    assert (expected - predict(network, "sd21", joined_latents=torch.zeros_like(joined))).abs().max() > 1e-3
    torch.testing.assert_close(
        predict(load(tiny_unet("sd21"), tmp_path), "sd21", joined_latents=joined), expected, rtol=1e-5, atol=1e-5
    )


@ALL
def test_a_preset_goes_through_an_artifact(base, preset, tmp_path):
    config = ModelConfig(base=base.uri, lora=LoraConfig(preset=preset))
    network = build_network(base, config, 0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.01)
    expected = output(network)
    description = describe(base, objective="diff2flow", method="lora", sampling=SamplingDefaults(), training={})
    save_artifact(tmp_path, network, description)
    model = load_model(str(tmp_path))
    torch.testing.assert_close(output(model.network), expected, rtol=1e-5, atol=1e-5)
    assert (expected - output(load_unet(base))).abs().max() > 1e-3


def test_an_unknown_preset_or_a_scale_beside_one_is_refused():
    with pytest.raises(ValueError, match=r"preset='large' is not known. Use one of base, small, attention"):
        LoraConfig(preset="large")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"alpha=8.0 with preset='base'.* Leave alpha out"):
        LoraConfig(preset="base", alpha=8.0)
