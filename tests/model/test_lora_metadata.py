"""The metadata of a single-file LoRA say what it is, for which family, and how it is sampled."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from d2f_core.model.adapter_metadata import family
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig
from d2f_core.model.export_adapter import export_single_file_lora
from d2f_core.model.single_file_lora import read_single_file_lora
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import trained


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


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
