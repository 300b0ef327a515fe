"""Pinned models are read again as they were stored, by older programs too, and a damaged record is named."""

import json
from pathlib import Path

import pytest

from d2f_core.evaluation import pins
from d2f_core.evaluation.pins import PINS_NAME, PinError, Pins, keep_pins, pin_models

STORED = {"candidate": "/models/a", "champion": "", "base": "/models/base"}


def pinned(output: Path, **changes: str) -> Pins:
    models = {"candidate": "/models/a", "champion": "", "champion_alias": "champion", "base": "/models/base"}
    return pin_models(str(output), **{**models, **changes})


def test_the_champion_stays_the_one_that_the_evaluation_began_with(tmp_path: Path) -> None:
    text = json.dumps(STORED, indent=1)
    (tmp_path / PINS_NAME).write_text(text)
    there = pinned(tmp_path, champion="auto")
    assert there == pinned(tmp_path) == Pins(**STORED) and there.to_json().decode() == text
    keep_pins(str(tmp_path), there)
    assert (tmp_path / PINS_NAME).read_text() == text
    with pytest.raises(PinError, match="evaluates the base '/models/base', not ''"):
        pinned(tmp_path, base="")


def test_another_champion_than_the_output_began_with_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate would move the alias that names the one, by a comparison with the other."""
    monkeypatch.setattr(pins, "get_alias", lambda name, alias: "3")
    monkeypatch.setattr(pins, "pin_model", lambda uri: uri.replace("@champion", "/4"))
    began = pinned(tmp_path, candidate="models:/m/4", champion="auto")
    keep_pins(str(tmp_path), began)
    for champion in ("/models/weak", "models:/m/2", "models:/other@champion", ""):
        with pytest.raises(PinError, match=r"compares with models:/m/3, not with .*or give another output"):
            pinned(tmp_path, candidate="models:/m/4", champion=champion)
    # As it began, by its number or by an alias that has moved since.
    for champion in ("models:/m/3", "models:/m@champion", "auto"):
        assert pinned(tmp_path, candidate="models:/m/4", champion=champion) == began


def test_the_version_that_the_alias_names_is_pinned_whatever_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"m": "3"}
    monkeypatch.setattr(pins, "get_alias", lambda name, alias: names.get(name))
    monkeypatch.setattr(pins, "pin_model", lambda uri: uri)
    for champion, compared in (("auto", "models:/m/3"), ("", ""), ("/other", "/other")):
        output = tmp_path / str(len(compared))
        found = pinned(output, candidate="models:/m/4", champion=champion)
        assert (found.champion, found.champion_at_start) == (compared, "models:/m/3")
        assert set(found.models) == {"candidate", "base", *(["champion"] if compared else [])}
        keep_pins(str(output), found)
        names["m"] = "5"
        assert pinned(output, candidate="models:/m/4", champion=champion) == found
        names["m"] = "3"
    assert pinned(tmp_path / "new", candidate="models:/n/1", champion="auto").champion_at_start == ""


def test_of_two_jobs_that_begin_at_one_output_the_second_is_refused_if_it_pinned_others(tmp_path: Path) -> None:
    first = Pins(candidate="models:/m/2", champion="models:/m/1", base="", champion_at_start="models:/m/1")
    keep_pins(str(tmp_path), first)
    keep_pins(str(tmp_path), first)
    with pytest.raises(PinError, match=r"was begun by another job at the same time.*Run this command again"):
        keep_pins(str(tmp_path), Pins(candidate="models:/m/2", champion="", base="", champion_at_start=""))


@pytest.mark.parametrize("text", ["", "[]", '{"candidate": "/models/a"}', json.dumps({**STORED, "teacher": "/t"})])
def test_a_damaged_record_is_refused_by_its_name(text: str, tmp_path: Path) -> None:
    (tmp_path / PINS_NAME).write_text(text)
    with pytest.raises(PinError, match=r"models\.json' is no record of an evaluation's models"):
        pinned(tmp_path)
