"""Prompts and captions that a text encoder does not read to their end are counted, by the rules that hold for them."""

import logging
from pathlib import Path

import pytest

from d2f_core.flow.long_captions import TOGETHER, cut_captions, cut_prompts
from d2f_core.import_images.report import caption_lengths
from d2f_core.model.base import describe_base
from d2f_core.model.caption_rules import CaptionRules
from tests.model.tiny_sd import write_tiny

LONG = "at cat a dog zebra " * 16 + "dog zebra"
"""200 tokens."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("sd15") / "base", "sd15")


def test_prompts_that_are_cut_are_counted_and_said(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    described, prompts = describe_base(str(base)), [*["a cat"] * TOGETHER, LONG, "z " * 76]
    with caplog.at_level(logging.WARNING, logger="d2f_core"):
        assert cut_prompts("p.jsonl", iter(prompts), described) == {"prompts_cut": 2, "tokens_cut_at_most": 125}
        assert cut_prompts("p", prompts, described.read_captions(CaptionRules(chunks=3))) == {}
    (record,) = caplog.records
    assert f"p.jsonl: 2 of {TOGETHER + 2} prompts are longer than the 75 tokens that" in record.message


def test_a_table_without_rows_and_a_base_without_tokenizer_have_nothing_counted(base: Path, tmp_path: Path) -> None:
    assert cut_captions("t", [], str(base), CaptionRules()) == {}
    assert cut_captions("t", [], str(tmp_path), CaptionRules()) == {}


def test_the_page_of_an_import_tells_what_is_cut_by_the_rules_that_will_hold(base: Path) -> None:
    for rules, most in ((CaptionRules(), 75), (CaptionRules(chunks=3), 225)):
        lengths, read = caption_lengths([LONG, "a cat"], str(base), rules)
        assert lengths.tolist() == [200, 3] and read == most
