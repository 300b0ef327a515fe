"""A model carries how its captions were read: whatever samples it reads prompts so, and an export says it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors import safe_open

from d2f_core.data.manifest import Manifest
from d2f_core.flow.evaluate import held_out_loss, straightness
from d2f_core.flow.generate.sampler import ImageSampler, fill_request
from d2f_core.flow.publish import image_pyfunc
from d2f_core.model.artifact import describe_model, load_model, read_description
from d2f_core.model.base import resolve_base
from d2f_core.model.caption_rules import CaptionRules
from d2f_core.model.config import LoraConfig
from d2f_core.model.export import export_diffusers
from d2f_core.model.export_adapter import export_peft, export_single_file_lora
from d2f_core.model.single_file.write import write_checkpoint_file
from d2f_core.model.text_encoder import load_text_encoder
from tests.model.artifacts import trained
from tests.model.tiny_sd import write_tiny

RULES = CaptionRules(chunks=2, clip_skip=1)
LONG = "at cat a dog zebra " * 12


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("sd15") / "base", "sd15")


@pytest.fixture(scope="module")
def model(base, tmp_path_factory) -> str:
    return trained(base, tmp_path_factory.mktemp("model") / "lora", LoraConfig(rank=2), captions=RULES, probe=False)


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory) -> str:
    """A model that reads captions as ever."""
    return trained(base, tmp_path_factory.mktemp("plain") / "lora", LoraConfig(rank=2), probe=False)


@pytest.fixture(scope="module")
def states(base) -> torch.Tensor:
    return load_text_encoder(resolve_base(str(base)).read_captions(RULES)).encode([LONG])


def test_only_a_model_with_rules_of_its_own_says_them_in_a_format_that_older_releases_refuse(plain, model):
    written = json.loads(Path(plain, "diff2flow.json").read_text())
    assert written["format_version"] == 1 and "captions" not in written
    told = read_description(Path(model))
    assert told["format_version"] == 3 and told["captions"] == {"chunks": 2, "clip_skip": 1}
    assert {**told, "captions": 0, "format_version": 1} == {**read_description(Path(plain)), "captions": 0}
    described, other = describe_model(model), describe_model(plain)
    assert (described.base.captions, other.base.captions) == (RULES, CaptionRules())
    assert described.content_hash != other.content_hash


def test_generating_and_serving_read_prompts_as_the_training_did(model, states):
    sampler = ImageSampler(load_model(model))  # of batch jobs, of the online service and of MLflow's loader
    assert states.shape[1] == 154
    torch.testing.assert_close(sampler._condition([LONG])["text_states"], states, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_words_behind_the_window_change_the_picture_of_a_model_that_reads_them(name, tmp_path):
    base = write_tiny(tmp_path / "base", name)
    trained_long = load_model(trained(base, tmp_path / "model", captions=CaptionRules(chunks=2), probe=False))
    far = []
    for rules in (CaptionRules(chunks=2), CaptionRules()):
        model = replace(trained_long, base=trained_long.base.read_captions(rules))
        given = {"steps": 1, "guidance": 2.0, "sample_id": "x"}
        prompts = [f"{'z ' * 80}{word}" for word in ("cat", "dog")]
        one, other = ImageSampler(model).sample([fill_request(model, prompt=each, **given) for each in prompts])
        assert one.error is None and one.latent is not None and other.latent is not None
        far.append(float(np.abs(one.latent - other.latent).max()))
    assert far[0] > 1e-4 and far[1] == 0


def test_mlflows_loader_reads_prompts_as_the_training_did(model, states):
    class Context:
        model_config, artifacts = None, {"model": model}

    loaded = image_pyfunc.ImageModel()
    loaded.load_context(Context())
    torch.testing.assert_close(loaded.sampler._condition([LONG])["text_states"], states, rtol=0, atol=1e-6)


class Asked(Exception):
    """The text encoder was asked for."""


@pytest.mark.parametrize("module", [straightness, held_out_loss])
def test_evaluating_reads_captions_as_the_training_did(model, monkeypatch, module):
    def load(base, **_):
        raise Asked(base.captions)

    monkeypatch.setattr(module, "load_text_encoder", load)
    with pytest.raises(Asked, match=r"chunks=2, clip_skip=1"):
        if module is straightness:
            straightness.follow_paths(model, cast(Any, SimpleNamespace(base_prediction="")), [], 1)
        else:
            nothing = Manifest(kind="images", files=())
            held_out_loss.losses_of(model, "", nothing, np.array([]), 64, 1, "")


def test_an_exported_directory_reads_captions_alike_and_tells_what_a_stock_pipeline_does(model, states, tmp_path):
    export_diffusers(model, str(tmp_path / "exported"))
    text = (tmp_path / "exported/README.md").read_text()
    told = ("in 2 chunks", "reads 77 tokens", "clip_skip=1 as diffusers counts", "sd-scripts and A1111 count 2)")
    assert not [part for part in told if part not in text]
    assert 'pipeline(prompt_embeds=given["text_states"], negative_prompt_embeds=empty["text_states"])' in text
    encoder = load_text_encoder(describe_model(str(tmp_path / "exported")).base)
    torch.testing.assert_close(encoder.condition([LONG])["text_states"], states, rtol=0, atol=1e-6)


def test_files_for_other_programs_tell_how_captions_are_read(base, model, tmp_path):
    lora, whole = str(tmp_path / "lora.safetensors"), str(tmp_path / "whole.safetensors")
    export_single_file_lora(model, lora)
    write_checkpoint_file(model, whole, base_uri=str(base))
    for file in (lora, whole):
        with safe_open(file, framework="pt") as opened:
            told = opened.metadata()
        assert (told["d2f_caption_chunks"], told["d2f_clip_skip"]) == ("2", "1")
        assert "reads 77 tokens" in told["modelspec.usage_hint"]
    export_peft(model, str(tmp_path / "peft"))
    assert "reads 77 tokens" in (tmp_path / "peft/README.md").read_text()


def test_exports_of_other_models_say_nothing_of_captions(plain, tmp_path):
    export_diffusers(plain, str(tmp_path / "exported"))
    export_peft(plain, str(tmp_path / "peft"))
    for text in ((tmp_path / place / "README.md").read_text() for place in ("exported", "peft")):
        assert "77 tokens" not in text and "## Prompts" not in text
    export_single_file_lora(plain, str(tmp_path / "lora.safetensors"))
    with safe_open(str(tmp_path / "lora.safetensors"), framework="pt") as opened:
        assert not {"d2f_caption_chunks", "d2f_clip_skip", "modelspec.usage_hint"} & opened.metadata().keys()
