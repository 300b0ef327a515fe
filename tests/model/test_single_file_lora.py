"""A single-file LoRA is the same network for us and for diffusers, whatever ranks and layers were trained."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d2f_core import storage
from d2f_core.model.artifact import ArtifactError, load_model
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig
from d2f_core.model.denoiser import as_denoiser, load_unet
from d2f_core.model.export_adapter import export_single_file_lora
from d2f_core.model.single_file_lora import (
    LayerChange,
    SingleFileLoraError,
    layer_changes,
    merge_single_file_lora,
    read_single_file_lora,
    write_single_file_lora,
)
from tests.flow.tiny_base import write_tiny_base
from tests.model.architectures import tiny_condition, tiny_inputs
from tests.model.artifacts import output, trained
from tests.model.lora_readers import loaded_by_comfy, loaded_by_diffusers
from tests.model.tiny_sdxl import write_tiny_sdxl


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


CONFIGS = [
    LoraConfig(rank=3),
    LoraConfig(rank=4, alpha=6.0, targets="attention"),
    LoraConfig(rank=2, alpha=1.0),
    LoraConfig(preset="attention"),
]


@pytest.mark.parametrize("lora", CONFIGS)
def test_a_single_file_lora_is_read_by_us_and_by_diffusers_to_the_same_network(base, tmp_path, lora):
    artifact, file = trained(base, tmp_path / "artifact", lora), tmp_path / "one.safetensors"
    exported = export_single_file_lora(artifact, str(file), ends="inside")
    expected = output(load_model(artifact).network)
    assert (expected - output(load_unet(resolve_base(str(base))))).abs().max() > 1e-3
    with safe_open(tmp_path / "artifact/adapter/adapter_model.safetensors", framework="pt") as adapter:
        pairs = len(list(adapter.keys())) // 2
    assert exported.keys == len(load_file(file)) == 3 * pairs and exported.layers == pairs and not exported.has_biases
    unet = load_unet(resolve_base(str(base)))
    merge_single_file_lora(unet, read_single_file_lora(file))
    torch.testing.assert_close(output(unet), expected, rtol=0, atol=1e-5)
    theirs = loaded_by_diffusers(base, file)
    assert sum("lora_A" in name or "lora_B" in name for name in theirs.state_dict()) == 2 * pairs
    torch.testing.assert_close(output(theirs), expected, rtol=0, atol=1e-5)
    comfy, unknown = loaded_by_comfy(base, file)
    torch.testing.assert_close(output(comfy), expected, rtol=0, atol=1e-5)
    assert not unknown


@pytest.mark.parametrize("lora", CONFIGS)
def test_adapted_ends_are_apart_for_releases_of_diffusers_that_misread_their_names(base, tmp_path, lora):
    artifact, file = trained(base, tmp_path / "artifact", lora), tmp_path / "one.safetensors"
    exported = export_single_file_lora(artifact, str(file))
    names = {key.partition(".")[0] for key in load_file(file)}
    assert all(name.startswith(("lora_unet_down_", "lora_unet_mid_", "lora_unet_up_")) for name in names)
    both = [file, Path(exported.ends_target)] if exported.ends_target else [file]
    assert bool(exported.ends_target) == bool(exported.ends) == (not lora.preset and lora.targets == "all")
    expected = output(load_model(artifact).network)
    torch.testing.assert_close(output(loaded_by_diffusers(base, *both)), expected, rtol=0, atol=1e-5)
    comfy, unknown = loaded_by_comfy(base, *both)
    torch.testing.assert_close(output(comfy), expected, rtol=0, atol=1e-5)
    assert not unknown


@pytest.mark.parametrize("preset", ["base", "small"])
def test_with_its_second_file_a_lora_with_trained_ends_loses_nothing_in_diffusers_and_comfy(base, tmp_path, preset):
    artifact = trained(base, tmp_path / "artifact", LoraConfig(preset=preset))
    file, ends = tmp_path / "one.safetensors", tmp_path / "one-ends.safetensors"
    expected = output(load_model(artifact).network)
    exported = export_single_file_lora(artifact, str(file))
    assert exported.ends == ("conv_in", "conv_out") and not exported.has_biases
    assert exported.keys == len(load_file(file)) == 3 * exported.layers and exported.ends_target == str(ends)
    theirs = loaded_by_diffusers(base, file, ends)
    torch.testing.assert_close(output(theirs), expected, rtol=0, atol=1e-5)
    theirs.fuse_lora()
    theirs.unload_lora()
    torch.testing.assert_close(output(theirs), expected, rtol=0, atol=1e-5)
    comfy, unknown = loaded_by_comfy(base, file, ends)
    torch.testing.assert_close(output(comfy), expected, rtol=0, atol=1e-5)
    assert unknown == {"unet.conv_in.lora_B.bias", "unet.conv_out.lora_B.bias"}, "which diff_b says again"
    ranks = {key: len(value) for key, value in load_file(ends).items() if key.endswith("lora_A.weight")}
    assert len(set(ranks.values())) == 1, "older releases of diffusers scale a layer of another rank"
    alone = loaded_by_diffusers(base, file)
    assert sum("lora_A" in name for name in alone.state_dict()) == exported.layers, "the first is read whole, too"
    assert (output(alone) - expected).abs().max() > 0.03


@pytest.mark.parametrize("preset", ["base", "small"])
def test_one_file_can_hold_the_ends_for_comfy(base, tmp_path, preset):
    artifact = trained(base, tmp_path / "artifact", LoraConfig(preset=preset))
    file, expected = tmp_path / "one.safetensors", output(load_model(artifact).network)
    export_single_file_lora(artifact, str(file))
    exported = export_single_file_lora(artifact, str(file), ends="inside")
    assert exported.ends == ("conv_in", "conv_out") and exported.has_biases
    assert exported.keys == 3 * exported.layers + 2 and exported.ends_target == ""
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"one.safetensors"}, "an old second file is gone"
    unet = load_unet(resolve_base(str(base)))
    merge_single_file_lora(unet, read_single_file_lora(file))
    torch.testing.assert_close(output(unet), expected, rtol=0, atol=1e-5)
    comfy, unknown = loaded_by_comfy(base, file)
    torch.testing.assert_close(output(comfy), expected, rtol=0, atol=1e-5)
    assert not unknown
    with pytest.raises(ValueError, match="diff_b"):
        loaded_by_diffusers(base, file)


@torch.no_grad()
def test_ranks_that_differ_by_layer_reach_diffusers_with_their_scale(base, tmp_path):
    """The preset `base` without its biases: 4 to 77 per layer, and two layers that were trained whole."""
    trained(base, tmp_path / "artifact", LoraConfig(preset="base"))
    network = PeftModel.from_pretrained(load_unet(resolve_base(str(base))), tmp_path / "artifact/adapter")
    changes = {
        name: LayerChange(down=change.down, up=change.up, alpha=change.alpha)
        for name, change in layer_changes(network).items()
    }
    assert len({change.rank for change in changes.values()}) > 3
    for name, before in (("conv_in", network.conv_in), ("conv_out", network.conv_out)):
        before.modules_to_save["default"].bias.copy_(before.original_module.bias)
        assert changes[name].alpha == changes[name].rank
    write_single_file_lora(tmp_path / "one.safetensors", changes, {})
    assert len({c.alpha for c in read_single_file_lora(tmp_path / "one.safetensors").layers.values()}) == 1
    torch.testing.assert_close(
        output(loaded_by_diffusers(base, tmp_path / "one.safetensors")), output(network), rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_a_lora_for_sdxl_is_read_by_us_and_by_diffusers_and_named_for_kohya(tmp_path):
    base, file = write_tiny_sdxl(tmp_path / "base"), tmp_path / "one.safetensors"
    artifact = trained(base, tmp_path / "artifact", LoraConfig(rank=3))
    exported = export_single_file_lora(artifact, str(file), ends="inside")
    assert exported.ends == ("conv_in", "conv_out") and exported.layers > 100
    named = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.resolution": "64x64",
    }
    assert read_single_file_lora(file).metadata.items() >= named.items()

    def answer(network):
        return as_denoiser(network)(*tiny_inputs(), **tiny_condition("sdxl"))

    expected = answer(load_model(artifact).network)
    assert (expected - answer(load_unet(resolve_base(str(base))))).abs().max() > 1e-3
    unet = load_unet(resolve_base(str(base)))
    merge_single_file_lora(unet, read_single_file_lora(file))
    torch.testing.assert_close(answer(unet), expected, rtol=0, atol=1e-5)
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    theirs = StableDiffusionXLPipeline(
        **parts, unet=load_unet(resolve_base(str(base))), scheduler=EulerDiscreteScheduler()
    )
    theirs.load_lora_weights(str(file))
    torch.testing.assert_close(answer(theirs.unet), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("linear", [False, True])
def test_every_layer_of_stable_diffusion_has_a_key_that_diffusers_finds_again(tmp_path, linear):
    """SD 1.5, whose transformers project by convolutions, and SD 2.1, which projects by linear layers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, use_linear_projection=linear)
    names = {name for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)}
    changes = {name: LayerChange(down=torch.ones(1, 1), up=torch.ones(1, 1), alpha=1.0) for name in names}
    assert write_single_file_lora(tmp_path / "one.safetensors", changes, {}) == 3 * len(names)
    state, _ = StableDiffusionPipeline.lora_state_dict(str(tmp_path / "one.safetensors"))
    found = {name.removeprefix("unet.") for name in convert_unet_state_dict_to_peft(state)}
    assert found == {f"{name}.lora_{side}.weight" for name in names for side in "AB"}


def test_a_lora_of_a_rectified_flow_is_one_and_a_naive_one_on_another_base_is_refused(base, tmp_path):
    flow = write_tiny_base(tmp_path / "flow")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(flow / "scheduler")
    file = tmp_path / "one.safetensors"
    for objective in ("diff2flow", "flow_matching"):
        artifact = trained(flow, tmp_path / objective, LoraConfig(rank=2), objective)
        exported = export_single_file_lora(artifact, str(file))
        metadata = read_single_file_lora(file).metadata
        assert (metadata["d2f_prediction_type"], metadata["modelspec.prediction_type"]) == ("flow_prediction", "sd3")
        theirs = loaded_by_diffusers(flow, file, Path(exported.ends_target))
        torch.testing.assert_close(output(theirs), output(load_model(artifact).network), rtol=0, atol=1e-5)
    naive = trained(base, tmp_path / "naive", LoraConfig(rank=2), "flow_matching")
    with pytest.raises(ArtifactError, match=r"naive flow_matching loss on a base of prediction_type='epsilon'.* ldm"):
        export_single_file_lora(naive, str(file))


@pytest.mark.parametrize("place", ["local", "s3"])
def test_beside_the_target_only_a_file_of_an_earlier_export_is_deleted(base, tmp_path, place, s3):
    del s3
    root = str(tmp_path) if place == "local" else "s3://d2f/test-beside"
    inner = trained(base, tmp_path / "inner", LoraConfig(preset="attention"))
    whole = trained(base, tmp_path / "whole", LoraConfig(preset="small"))
    target, second = f"{root}/one.safetensors", f"{root}/one-ends.safetensors"
    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors", {"ss_network_dim": "4"})
    for foreign in ((tmp_path / "foreign.safetensors").read_bytes(), b"no safetensors"):
        storage.write_bytes(second, foreign)
        export_single_file_lora(inner, target)
        before = storage.read_bytes(target)
        with pytest.raises(SingleFileLoraError, match=r"is not one that this project exported\. Move it"):
            export_single_file_lora(whole, target)
        assert (storage.read_bytes(second), storage.read_bytes(target)) == (foreign, before)
    storage.remove_tree(second)
    for model, both in ((whole, True), (whole, True), (inner, False)):
        assert bool(export_single_file_lora(model, target).ends_target) == storage.exists(second) == both
    if place == "local":
        storage.write_bytes(f"{second}/mine.txt", b"mine")
        export_single_file_lora(inner, target)
        with pytest.raises(SingleFileLoraError, match="Move it"):
            export_single_file_lora(whole, target)
        assert storage.read_bytes(f"{second}/mine.txt") == b"mine"


def test_a_file_that_lost_a_key_or_fits_no_layer_is_refused(base, tmp_path):
    change = LayerChange(down=torch.ones(1, 3), up=torch.ones(2, 1), alpha=1.0)
    write_single_file_lora(tmp_path / "other.safetensors", {"no.such": change}, {})
    with pytest.raises(SingleFileLoraError, match="no linear or convolutional layer 'no_such'"):
        merge_single_file_lora(
            load_unet(resolve_base(str(base))), read_single_file_lora(tmp_path / "other.safetensors")
        )
    tensors = load_file(tmp_path / "other.safetensors")
    del tensors["lora_unet_no_such.alpha"]
    save_file(tensors, tmp_path / "less.safetensors", {"d2f_keys": "3"})
    with pytest.raises(SingleFileLoraError, match="has 2 keys, but 3 were written"):
        read_single_file_lora(tmp_path / "less.safetensors")
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(SingleFileLoraError, match=r"has no \['alpha'\]"):
        read_single_file_lora(tmp_path / "less.safetensors")
    save_file({"lora_te_text.lora_up.weight": torch.ones(1)}, tmp_path / "text.safetensors")
    with pytest.raises(SingleFileLoraError, match="not of this layout"):
        read_single_file_lora(tmp_path / "text.safetensors")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use_dora": True}, "has a DoRA"),
        ({"lora_bias": True, "target_modules": ["conv1"]}, "a LoRA with a bias"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["conv_norm_out"]}, "'conv_norm_out', trained whole, is a GroupNorm"),
    ],
)
def test_an_adapter_that_the_single_file_layout_cannot_hold_is_refused(base, fields, reason):
    config = PeftLoraConfig(**{"r": 2, "target_modules": ["to_q"], **fields})
    network = get_peft_model(load_unet(resolve_base(str(base))), config)
    with pytest.raises(SingleFileLoraError, match=reason):
        layer_changes(network)
