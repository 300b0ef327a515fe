"""A single-file LoRA is the same network for us and for diffusers, whatever ranks and layers were trained."""

import json
import shutil
from pathlib import Path
from typing import cast

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
from torch import Tensor, nn

from d2f_core.model.adapter_metadata import family
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
from tests.model.tiny_sdxl import write_tiny_sdxl


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


def loaded_by_diffusers(base: Path, *files: Path) -> UNet2DConditionModel:
    """The UNet of a stock pipeline that loaded each file as an adapter, all of them active."""
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=load_unet(resolve_base(str(base))),
        scheduler=EulerDiscreteScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for file in files:
        pipeline.load_lora_weights(str(file), adapter_name=file.stem)
    pipeline.set_adapters([file.stem for file in files])
    return pipeline.unet


@torch.no_grad()
def loaded_by_comfy(base: Path, *files: Path) -> tuple[UNet2DConditionModel, set[str]]:
    """The UNet with what ComfyUI adds for each file, and the keys of which it says that they were not loaded.

    It knows a diffusers layer as `lora_unet_` with underscores, and as `unet.` with dots, where attention projections
    have `.processor` in their names. Of each it reads down, up and alpha, or A and B, and the change of a bias.
    """
    unet, unknown = load_unet(resolve_base(str(base))), set[str]()
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    for file in files:
        tensors = load_file(file)
        for name, layer in layers.items():
            for key in (f"lora_unet_{name.replace('.', '_')}", f"unet.{name.replace('.to_', '.processor.to_')}"):
                alpha, bias = tensors.pop(f"{key}.alpha", None), tensors.pop(f"{key}.diff_b", None)
                for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
                    if (second := tensors.pop(f"{key}.{up}.weight", None)) is not None:
                        first = tensors.pop(f"{key}.{down}.weight")
                        scale = 1.0 if alpha is None else alpha / len(first)
                        layer.weight += scale * (second.flatten(1) @ first.flatten(1)).reshape(layer.weight.shape)
                if bias is not None:
                    cast(Tensor, layer.bias).add_(bias)
        unknown |= tensors.keys()
    return unet, unknown


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


KINDS = [("epsilon", "epsilon"), ("v_prediction", "v"), ("sample", "x0"), ("flow_prediction", "sd3")]


@pytest.mark.parametrize(("kind", "named"), KINDS)
def test_the_metadata_say_what_the_network_predicts(base, tmp_path, kind, named):
    shutil.copytree(base, tmp_path / "base")
    scheduler = tmp_path / "base/scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": kind}))
    artifact = trained(tmp_path / "base", tmp_path / "artifact", LoraConfig(rank=2))
    export_single_file_lora(artifact, str(tmp_path / "one.safetensors"))
    metadata = read_single_file_lora(tmp_path / "one.safetensors").metadata
    assert (metadata["d2f_prediction_type"], metadata["modelspec.prediction_type"]) == (kind, named)
    assert "ss_base_model_version" not in metadata, "no family has text states of this width"


FAMILIES = [
    ({"cross_attention_dim": 768}, False, "sd_v1", "False", "stable-diffusion-v1/lora"),
    ({"cross_attention_dim": 768}, True, "sd_v1_v", "False", "stable-diffusion-v1/lora"),
    ({"cross_attention_dim": 1024}, False, "sd_v2", "True", "stable-diffusion-v2-512/lora"),
    ({"cross_attention_dim": 1024}, True, "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora"),
]


@pytest.mark.parametrize(("unet", "v", "version", "second", "architecture"), FAMILIES)
def test_the_metadata_name_the_family_of_the_base_as_kohya_does(unet, v, version, second, architecture):
    named = {"ss_base_model_version": version, "ss_v2": second, "modelspec.architecture": architecture}
    assert family(unet, v=v) == named


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


def test_a_single_file_carries_how_to_sample_it_and_what_it_was_made_for(base, tmp_path):
    artifact = trained(base, tmp_path / "artifact", LoraConfig(rank=4, alpha=2.0), steps=12, guidance=4.5)
    export_single_file_lora(artifact, str(tmp_path / "style.safetensors"), dtype=torch.float16)
    lora = read_single_file_lora(tmp_path / "style.safetensors")
    assert (
        lora.metadata.items()
        >= {
            "d2f_prediction_type": "epsilon",
            "d2f_sampler": "euler in flow time",
            "d2f_steps": "12",
            "d2f_guidance": "4.5",
            "d2f_shift": "1.0",
            "d2f_base_sha256": resolve_base(str(base)).content_hash,
            "d2f_keys": str(3 * len(lora.layers)),
            "ss_network_module": "networks.lora",
            "ss_network_dim": "4",
            "ss_network_alpha": "2",
            "ss_network_args": '{"conv_dim": "4", "conv_alpha": "2"}',
            "ss_output_name": "style",
            "modelspec.title": "style",
            "modelspec.resolution": "16x16",
            "d2f_time_grid": "uniform",
        }.items()
    )
    assert json.loads(lora.metadata["d2f_schedule"])["beta_schedule"] == "scaled_linear"
    assert {change.up.dtype for change in lora.layers.values()} == {torch.float16}
    assert lora.layers["down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"].alpha == 2.0


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
