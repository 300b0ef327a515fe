"""The directory of an export: what was there before, where it may be, names of tensors, precision, card."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPTextModel

from d2f_core import storage
from d2f_core.flow.generate.sampler import ImageSampler, fill_request
from d2f_core.model.artifact import ArtifactError, TrainedModel, describe_model, load_model
from d2f_core.model.base import BaseModelError, resolve_base
from d2f_core.model.config import LoraConfig
from d2f_core.model.denoiser import load_unet
from d2f_core.model.export import export_diffusers
from tests.flow.tiny_base import write_tiny_base
from tests.model.artifacts import output, trained
from tests.model.complete_base import write_complete_base

PARTS = {"text_encoder": None, "tokenizer": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def artifact(base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(base, tmp_path_factory.mktemp("artifact") / "model")


def leave_an_older_export(base: Path, target: Path) -> None:
    """The base's weights in shards and in half precision, as an export of a larger model leaves them."""
    unet = load_unet(resolve_base(str(base)))
    unet.save_pretrained(target / "unet", max_shard_size="100KB")
    unet.save_pretrained(target / "unet", variant="fp16", max_shard_size="1GB")
    (target / "scheduler").mkdir()
    (target / "scheduler/old.json").write_text("{}")
    (target / "notes.txt").write_text("mine")


@pytest.mark.parametrize("place", ["local", "s3"])
def test_nothing_of_an_older_export_is_loaded(base: Path, artifact: str, tmp_path: Path, place: str, s3) -> None:
    del s3
    leave_an_older_export(base, tmp_path / "old")
    target = str(tmp_path / "old") if place == "local" else "s3://d2f/test-used/exported"
    if place == "s3":
        storage.upload_tree(tmp_path / "old", target)
    export_diffusers(artifact, target)
    found = tmp_path / "old" if place == "local" else storage.download_tree(target, tmp_path / "found")
    pipeline = DiffusionPipeline.from_pretrained(found, **PARTS)
    torch.testing.assert_close(output(pipeline.unet), output(load_model(artifact).network), rtol=0, atol=1e-5)
    assert sorted(file.name for file in (found / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert not (found / "scheduler/old.json").exists() and (found / "notes.txt").read_text() == "mine"


def opens(directory: Path) -> bool:
    try:
        return bool(load_model(str(directory)))
    except (ArtifactError, BaseModelError):
        return False


def test_a_half_replaced_directory_is_opened_neither_as_a_model_nor_as_a_base(base, artifact, tmp_path, monkeypatch):
    export_diffusers(artifact, str(tmp_path / "out"))
    changed, found = trained(base, tmp_path / "changed", LoraConfig(rank=2)), []

    def watched(function):
        def run(*args, **more):
            function(*args, **more)
            found.append((opens(tmp_path / "out"), (tmp_path / "out/model_index.json").exists()))

        return run

    for name in ("remove_tree", "upload_tree", "write_bytes"):
        monkeypatch.setattr(storage, name, watched(getattr(storage, name)))
    export_diffusers(changed, str(tmp_path / "out"))
    assert len(found) > 6 and not any(opened for opened, _ in found[:-2])
    assert found[0] == (False, True), "diffusers misses the scheduler that model_index.json names"
    assert found[1:] == [(False, False)] * (len(found) - 3) + [(True, False), (True, True)]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
@pytest.mark.parametrize("objective", ["diff2flow", "flow_matching"])
def test_an_export_is_a_model_without_its_base(tmp_path: Path, objective: str, lora: LoraConfig | None) -> None:
    base = write_complete_base(tmp_path / "base")
    artifact = trained(base, tmp_path / "artifact", lora, objective)
    export_diffusers(artifact, str(tmp_path / "exported"))
    before, given = load_model(artifact), load_model(str(tmp_path / "exported"), base_uri=str(base))
    made, digest = [image_of(before), image_of(given)], before.base.content_hash
    base.rename(tmp_path / "elsewhere")
    described, model = describe_model(str(tmp_path / "exported")), load_model(str(tmp_path / "exported"))
    np.testing.assert_allclose(image_of(model), made[0], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(image_of(model), made[1])
    assert model.base.content_hash == described.base.content_hash == digest
    assert model.base.scheduler_config == described.base.scheduler_config == given.base.scheduler_config
    assert model.prediction_type == "epsilon" and model.base.path == tmp_path / "exported"
    damaged = tmp_path / "exported/unet/diffusion_pytorch_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match=r"diffusion_pytorch_model.safetensors' has sha256"):
        load_model(str(tmp_path / "exported"))


def image_of(model: TrainedModel) -> np.ndarray:
    """Latents of an image from a prompt."""
    (made,) = ImageSampler(model).sample([fill_request(model, prompt="a cat", steps=3, guidance=2.0)])
    assert made.latent is not None
    return made.latent


def test_an_export_over_what_it_reads_is_refused_before_anything_is_deleted(base: Path, tmp_path: Path) -> None:
    artifact = trained(base, tmp_path / "unet")
    (tmp_path / "link").symlink_to(tmp_path / "unet")
    for target in (artifact, f"{artifact}/", tmp_path / "link", f"{artifact}/unet", tmp_path, base, base / "out"):
        with pytest.raises(ArtifactError, match=r"overlaps .*Give a directory of its own"):
            export_diffusers(artifact, str(target))
    assert load_model(artifact) and resolve_base(str(base)).content_hash


def test_tensors_have_the_names_that_older_programs_read(tmp_path: Path) -> None:
    """transformers 5 saves text encoder and safety checker with one prefix less; older releases find nothing then."""
    base = write_complete_base(tmp_path / "base")
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
    encoder.save_pretrained(base / "text_encoder", max_shard_size="5KB")
    (base / "text_encoder/model.safetensors").unlink()
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**small, "image_size": 8, "patch_size": 4}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=vision, projection_dim=8))
    checker.save_pretrained(base / "safety_checker")
    export_diffusers(trained(base, tmp_path / "artifact"), str(tmp_path / "exported"))
    exported = tmp_path / "exported"
    index = json.loads((exported / "text_encoder/model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted((exported / "text_encoder").glob("*.safetensors"))
    keys = {name: file.name for file in shards for name in load_file(file)}
    assert keys == index and len(shards) > 1 and all(name.startswith("text_model.") for name in keys)
    with safe_open(exported / "safety_checker/model.safetensors", framework="pt") as written:
        nested = [name for name in written.keys() if name.startswith("vision_model.")]
    assert nested and all(name.startswith("vision_model.vision_model.") for name in nested)
    for saved, part in ((encoder, "text_encoder"), (checker, "safety_checker")):
        loaded = type(saved).from_pretrained(exported / part).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_unet_is_written_in_the_precision_that_is_asked_for(base, artifact, tmp_path, dtype) -> None:
    export_diffusers(artifact, str(tmp_path / "half"), dtype=dtype)
    weights = load_file(tmp_path / "half/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    again = load_model(str(tmp_path / "half"), base_uri=str(base))
    expected = load_model(artifact).network.state_dict()
    assert all(
        torch.equal(tensor, expected[name].to(dtype).float()) for name, tensor in again.network.state_dict().items()
    )


def test_weights_that_the_precision_cannot_hold_are_refused(base: Path, tmp_path: Path) -> None:
    large = write_tiny_base(tmp_path / "base")
    network = load_unet(resolve_base(str(large)))
    with torch.no_grad():
        network.conv_in.bias[0] = 1e6
    network.save_pretrained(large / "unet")
    artifact = trained(large, tmp_path / "artifact")
    with pytest.raises(ArtifactError, match=r"'conv_in.bias' and 0 more are not finite in torch.float16. Use bfloat16"):
        export_diffusers(artifact, str(tmp_path / "half"), dtype=torch.float16)


CARD = "---\nlicense: creativeml-openrail-m\ntags: [a]\n---\n# A card"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (CARD, {"license": "creativeml-openrail-m"}),
        ("---\n: [", {"license": "other", "license_name": "that-of-the-base-model"}),
        ("---\na: [\n---", {"license": "other", "license_name": "that-of-the-base-model"}),
        (None, {"license": "other", "license_name": "that-of-the-base-model"}),
    ],
)
def test_the_card_says_to_hubs_what_it_is(tmp_path: Path, card: str | None, licence: dict) -> None:
    base = write_tiny_base(tmp_path / "base")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0"}
    (base / "model_index.json").write_text(json.dumps(index))
    if card:
        (base / "README.md").write_text(card)
    artifact = trained(base, tmp_path / "artifact")
    described = json.loads((tmp_path / "artifact/diff2flow.json").read_text())
    described["base"]["uri"] = "owner/name"
    (tmp_path / "artifact/diff2flow.json").write_text(json.dumps(described))
    export_diffusers(artifact, str(tmp_path / "exported"), base_uri=str(base))
    head = yaml.safe_load((tmp_path / "exported/README.md").read_text().split("---\n")[1])
    told = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "base_model": "owner/name"}
    assert head == {**licence, **told}
    version = json.loads((tmp_path / "exported/model_index.json").read_text())["_diffusers_version"]
    assert version == diffusers.__version__
