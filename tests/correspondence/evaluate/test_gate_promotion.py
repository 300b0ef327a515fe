"""The matchers' gate moves the alias last, and the files say what came of it."""

import contextlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from d2f_core.correspondence.evaluate import gate as evaluate_gate
from d2f_core.correspondence.evaluate import job
from d2f_core.correspondence.evaluate.answers import EXACT, FLOOR
from d2f_core.correspondence.evaluate.config import EvaluateMatchesConfig, MatcherGateConfig
from d2f_core.evaluation import pins, promotion
from d2f_core.evaluation.pins import PinError
from d2f_core.tracking import ModelVersionInfo
from d2f_core.tracking.server import UnreachableTrackingError
from tests.correspondence.evaluate.test_gate import PAIRS, made, right
from tests.correspondence.evaluate.test_measure import FIRST, SECOND

APART = [
    replace(
        pair,
        source=replace(FIRST, data=(FIRST.data or b"") + b"%d" % number),
        target=replace(SECOND, data=(SECOND.data or b"") + b"%d" % number),
    )
    for number, pair in enumerate(PAIRS)
]
"""Pairs that share no image: what follows a picture in its file is another one, and not seen."""


class Alias:
    """`m@champion`, whose lease is held."""

    def __init__(self, files: Path) -> None:
        self.named, self.files, self.away, self.move_requested = [1], files, False, True

    def current(self) -> str:
        return str(self.named[-1])

    def promote(self, version: str) -> None:
        assert not (self.files / "report.html").exists(), "the files are written afterwards"
        if self.away:
            raise UnreachableTrackingError("MLflow could not set m@champion. The same command goes on from there.")
        self.named.append(int(version))


@pytest.fixture
def alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Alias:
    """Of a matcher `a`, version 2, that is better than the champion; nothing is asked of MLflow, nor of a matcher."""
    alias = Alias(tmp_path)
    measured = {("random", FLOOR): right(0.2, 1), ("box copy", FLOOR): right(0.3, 2)}
    measured |= {(name, EXACT): right(share, 3) for name, share in (("b", 0.4), ("champion", 0.5), ("a", 0.8))}
    version = ModelVersionInfo(name="m", version="2", uri="", url="", content_hash="", run_id="", tags={})
    monkeypatch.setattr(pins, "get_alias", lambda name, _: alias.current())
    for module in (pins, evaluate_gate):
        monkeypatch.setattr(module, "pin_model", lambda uri: uri)
    monkeypatch.setattr(promotion, "holding", lambda *_, **__: contextlib.nullcontext(alias))
    monkeypatch.setattr(promotion, "complete_version", lambda name, number: version)
    monkeypatch.setattr(promotion, "check_leases", lambda name, *, output: None)
    monkeypatch.setattr(job, "check_matches", lambda config: {})
    monkeypatch.setattr(job, "load_pairs", lambda config: job.LoadedPairs(pairs=APART, ledger=[], images=""))

    def measure_all(config: EvaluateMatchesConfig, pairs: list) -> dict:
        logging.getLogger("d2f_core").info("measured")
        return measured

    monkeypatch.setattr(job, "measure_all", measure_all)
    return alias


def asked(tmp_path: Path) -> EvaluateMatchesConfig:
    return made(str(tmp_path), "a", uri="models:/m/2", gate=MatcherGateConfig(candidate="a"))


@pytest.mark.parametrize("broken", ["shown_pairs", "scores"])
def test_the_alias_does_not_move_when_the_files_cannot_be_made(
    alias: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    kept = getattr(job, broken)

    def fail(*arguments, **more):
        if broken == "shown_pairs":
            raise ValueError("no JSON: it cannot be drawn")
        return {**kept(*arguments, **more), "points": float("nan")}

    monkeypatch.setattr(job, broken, fail)
    with pytest.raises(ValueError, match="JSON"):
        job.evaluate_matches(asked(tmp_path))
    assert alias.named == [1] and not (tmp_path / "report.html").exists()


def test_what_the_pairs_see_is_said_before_and_after(alias: Alias, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    gate = job.evaluate_matches(asked(tmp_path))["gate"]
    said = [line for line in caplog.messages if line.startswith("gate: ") or line == "measured"]
    assert (
        said[0].startswith("gate: 120 pairs of 240 images will see a difference of at most") and said[1] == "measured"
    )
    assert f"gate: {gate['verdict']['power']}" in said[2:]
    page = (tmp_path / "report.html").read_text()
    assert gate["verdict"]["power"] in page and "each end at the rule" in page


def test_the_files_say_what_came_of_the_promotion(alias: Alias, tmp_path: Path) -> None:
    """Also when a command that was killed after it had moved the alias is repeated: the pinned champion stays."""
    config = asked(tmp_path)

    def said() -> tuple[dict, str]:
        page = (tmp_path / "report.html").read_text()
        (tmp_path / "report.html").unlink()
        return json.loads((tmp_path / "scores.json").read_text())["gate"], page

    with pytest.raises(PinError, match=r"m@champion is version 1, .*--gate\.champion auto, or --gate\.no-promote"):
        job.evaluate_matches(replace(config, gate=replace(config.gate, champion="")))
    alias.away = True
    with pytest.raises(UnreachableTrackingError, match="The same command goes on"):
        job.evaluate_matches(config)
    gate, page = said()
    assert gate["promotion"].startswith("Unknown whether m@champion moved to version 2") and gate["refused"]
    assert "Unknown whether m@champion moved to version 2" in page and "Not promoted" not in page
    alias.away = False
    job.evaluate_matches(config)
    gate, page = said()
    assert alias.named == [1, 2] and gate["refused"] is None
    assert gate["promotion"] == "m@champion moved to version 2 (before: version 1)"
    job.evaluate_matches(config)
    again, page = said()
    assert alias.named == [1, 2] and again == {**gate, "promotion": "m@champion is version 2 already"}
    alias.named.append(3)
    with pytest.raises(PinError, match=r"m@champion moved to version 3"):
        job.evaluate_matches(config)
    gate, page = said()
    assert alias.named[-1] == 3 and gate["refused"].startswith("m@champion moved")
    assert "Not promoted: m@champion moved to version 3" in page
