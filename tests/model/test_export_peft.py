"""An exported PEFT directory is the same network for PEFT, in old releases too, and says how it is loaded."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from d2f_core.model.artifact import ArtifactError, load_model
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig
from d2f_core.model.denoiser import load_unet
from d2f_core.model.export_adapter import export_peft
from d2f_core.model.peft_layout import plain_config, public_name
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import output, trained

FIELDS_OF_PEFT_0_13 = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r",
    "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config",
    "megatron_core", "loftq_config", "use_dora", "layer_replication", "runtime_config",
}  # fmt: skip
"""It refuses a config with any other."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


def test_an_exported_adapter_is_read_by_peft(base, tmp_path):
    artifact = trained(base, tmp_path / "artifact", LoraConfig(preset="base"))
    assert export_peft(artifact, str(tmp_path / "adapter")) == str(tmp_path / "adapter")
    weights = [place / "adapter_model.safetensors" for place in (tmp_path / "adapter", tmp_path / "artifact/adapter")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    network = PeftModel.from_pretrained(load_unet(resolve_base(str(base))), tmp_path / "adapter")
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", framework="pt") as written:
        keys = len(list(written.keys()))
    pairs = sum(isinstance(module, LoraLayer) for module in network.modules())
    assert keys == 2 * pairs + 4 and pairs > 0, "and weight and bias of the two convolutions that are trained whole"
    torch.testing.assert_close(output(network), output(load_model(artifact).network), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "adapter/diff2flow.json").read_text())["sampling"]["solver"] == "euler"


@pytest.mark.parametrize("lora", [LoraConfig(preset="base"), LoraConfig(rank=8), LoraConfig(rank=2, alpha=6.0)])
def test_the_config_of_an_exported_adapter_says_what_is_not_usual_and_names_no_place_of_this_machine(
    base, tmp_path, lora
):
    artifact = trained(base, tmp_path / "artifact", lora)
    export_peft(artifact, str(tmp_path / "exported"))
    written = json.loads((tmp_path / "exported/adapter_config.json").read_text())
    assert written.keys() <= FIELDS_OF_PEFT_0_13 and written["base_model_name_or_path"] == base.name
    assert {"peft_type", "r", "lora_alpha", "target_modules"} <= written.keys()
    ours, theirs = (
        {**PeftLoraConfig.from_pretrained(str(tmp_path / name)).to_dict(), "base_model_name_or_path": ""}
        for name in ("artifact/adapter", "exported")
    )
    assert ours == theirs, "what is left out is at its default"
    for name in ("adapter_config.json", "diff2flow.json", "README.md"):
        text = (tmp_path / "exported" / name).read_text()
        assert base.name in text and not any(str(place) in text for place in (base.parent, tmp_path)), name


def test_a_setting_that_is_not_at_its_default_stays_in_the_config():
    written = PeftLoraConfig(r=8, target_modules=["to_q"], use_dora=True, peft_version="0.21.2").to_dict()
    assert plain_config(json.loads(json.dumps(written, default=list))) == {
        "peft_type": "LORA", "inference_mode": False, "r": 8, "lora_alpha": 8, "target_modules": ["to_q"],
        "use_dora": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("uri", "name"),
    [("owner/model", "owner/model"), ("s3://models/sd", "s3://models/sd"), ("/data/models/sd", "sd"), ("~/sd", "sd")],
)
def test_a_base_is_named_without_the_place_where_this_machine_keeps_it(uri, name):
    assert public_name(uri) == name


def test_what_a_pipeline_makes_of_the_directory_is_what_its_readme_says(base, tmp_path):
    """`load_lora_weights` finds no key it knows; with a later release that does, the README is wrong."""
    export_peft(trained(base, tmp_path / "artifact", LoraConfig(rank=2)), str(tmp_path / "exported"))
    readme = (tmp_path / "exported/README.md").read_text()
    assert 'PeftModel.from_pretrained(unet, "this directory")' in readme and "it loads nothing of this" in readme
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    unet = load_unet(resolve_base(str(base)))
    before, scheduler = output(unet), EulerDiscreteScheduler()
    pipeline = StableDiffusionPipeline(**parts, unet=unet, scheduler=scheduler, requires_safety_checker=False)
    pipeline.load_lora_weights(str(tmp_path / "exported"), weight_name="adapter_model.safetensors")
    assert torch.equal(output(pipeline.unet), before)


def test_an_exported_adapter_is_refused_as_a_model_with_what_reads_it(base, tmp_path):
    export_peft(trained(base, tmp_path / "artifact", LoraConfig(rank=2)), str(tmp_path / "exported"))
    with pytest.raises(ArtifactError, match=r"belongs to an export for PEFT, which PeftModel\.from_pretrained reads"):
        load_model(str(tmp_path / "exported"))
