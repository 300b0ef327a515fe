"""Pinned models are read again as they were stored, and a damaged record is named."""

import json
from pathlib import Path

import pytest

from d2f_core.evaluation.pins import PINS_NAME, PinError, Pins, keep_pins, pin_models

STORED = {"candidate": "/models/a", "champion": "", "base": "/models/base"}


def pinned(output: Path, **changes: str) -> Pins:
    models = {"candidate": "/models/a", "champion": "", "champion_alias": "champion", "base": "/models/base"}
    return pin_models(str(output), **{**models, **changes})


def test_the_champion_stays_the_one_that_the_evaluation_began_with(tmp_path: Path) -> None:
    text = json.dumps(STORED, indent=1)
    (tmp_path / PINS_NAME).write_text(text)
    there = pinned(tmp_path, champion="/models/newer")
    assert there == Pins(**STORED) and there.to_json().decode() == text
    keep_pins(str(tmp_path), there)
    assert (tmp_path / PINS_NAME).read_text() == text
    with pytest.raises(PinError, match="evaluates the base '/models/base', not ''"):
        pinned(tmp_path, base="")


@pytest.mark.parametrize("text", ["", "[]", '{"candidate": "/models/a"}', json.dumps({**STORED, "teacher": "/t"})])
def test_a_damaged_record_is_refused_by_its_name(text: str, tmp_path: Path) -> None:
    (tmp_path / PINS_NAME).write_text(text)
    with pytest.raises(PinError, match=r"models\.json' is no record of an evaluation's models"):
        pinned(tmp_path)
