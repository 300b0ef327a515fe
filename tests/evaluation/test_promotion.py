"""When a gate may move the alias, and what the report says of it; the registry is played by a few lines."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d2f_core.evaluation import promotion
from d2f_core.evaluation.pins import PINS_NAME, PinError, Pins
from d2f_core.evaluation.promotion import Promotion, check_may_promote, promote_candidate
from d2f_core.lease import LeaseError, LeaseLostError
from d2f_core.tracking import ModelVersionInfo, TrackingError
from d2f_core.tracking.server import UnreachableTrackingError

AUTO = Pins(candidate="models:/m/2", champion="models:/m/1", base="", champion_at_start="models:/m/1")
FIRST = Pins(candidate="models:/m/2", champion="", base="", champion_at_start="")
AWAY, LOST = UnreachableTrackingError("MLflow could not x."), LeaseLostError("the lease was lost.")
OTHER = Pins(candidate="models:/m/2", champion="/elsewhere", base="", champion_at_start="models:/m/1")


class Registry:
    """`m@champion`, its marks, and what goes wrong."""

    def __init__(self) -> None:
        self.names: str | None = "1"
        self.marks: dict[str, str] = {}
        self.trouble: Exception | None = None
        self.held = self.move_requested = False

    @contextlib.contextmanager
    def holding(self, name: str, alias: str, purpose: str, *, output: str) -> Iterator["Registry"]:
        assert (name, alias, output) == ("m", "champion", "/out") and "promote m@champion to version 2" in purpose
        self.held = True
        yield self
        self.held = False

    def current(self) -> str | None:
        return self.names

    def promote(self, version: str) -> None:
        assert self.held
        if self.trouble:
            raise self.trouble
        self.names = version

    def complete_version(self, name: str, version: str) -> ModelVersionInfo:
        tags = {f"d2f.rolled_back.{alias}": to for alias, to in self.marks.items()}
        return ModelVersionInfo(name=name, version=version, uri="", url="", content_hash="", run_id="", tags=tags)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry()
    for name in ("holding", "complete_version"):
        monkeypatch.setattr(promotion, name, getattr(made, name))
    monkeypatch.setattr(promotion, "check_leases", lambda name, *, output: None)
    return made


def promoted(pins: Pins) -> Promotion:
    return promote_candidate(pins, "/out", alias="champion")


def old(pins: Pins) -> Pins:
    """As an older program stored them."""
    return Pins(candidate=pins.candidate, champion=pins.champion, base=pins.base)


@pytest.mark.parametrize(
    ("pins", "now", "text"),
    [
        (AUTO, "1", "m@champion moved to version 2 (before: version 1)"),
        (old(AUTO), "1", "m@champion moved to version 2 (before: version 1)"),
        (FIRST, None, "m@champion moved to version 2 (before: no version)"),
        (old(FIRST), None, "m@champion moved to version 2 (before: no version)"),
        (AUTO, "2", "m@champion is version 2 already"),
        (OTHER, "2", "m@champion is version 2 already"),
    ],
)
def test_an_alias_that_names_what_was_compared_moves_once(
    registry: Registry, pins: Pins, now: str | None, text: str
) -> None:
    registry.names = now
    assert promoted(pins) == Promotion(text=text) and registry.names == "2"


@pytest.mark.parametrize(
    ("pins", "now", "reason"),
    [
        (AUTO, "3", "m@champion moved to version 3 while this evaluation ran against models:/m/1. Evaluate again"),
        (AUTO, None, "m@champion moved to no version while this evaluation"),
        (FIRST, "1", "m@champion moved to version 1 while this evaluation ran against none"),
        (old(FIRST), "1", "m@champion moved to version 1 while"),
        (OTHER, "3", "m@champion moved to version 3 while"),
        (OTHER, "1", "m@champion is version 1, and the candidate is compared with /elsewhere: a gate may replace only"),
        (old(OTHER), "1", "m@champion moved to version 1 while this evaluation ran against /elsewhere"),
    ],
)
def test_an_alias_that_names_something_else_stays(registry: Registry, pins: Pins, now: str | None, reason: str) -> None:
    registry.names = now
    found = promoted(pins)
    assert registry.names == now and isinstance(found.error, PinError) and not found.unknown
    assert found.text.startswith(f"Not promoted: {reason}") and not found.text.endswith(".")


def test_a_version_that_was_rolled_back_from_is_not_promoted_by_a_gate(registry: Registry) -> None:
    registry.marks = {"other": "7"}
    check_may_promote(AUTO, "/out", alias="champion")
    registry.marks = {"champion": "1"}
    with pytest.raises(PinError, match=r"version 2 of m was rolled back from: m@champion went back to version 1\. .*"
                       r"pipelines\.promote emoji-flow --name m --version 2` does"):  # fmt: skip
        check_may_promote(AUTO, "/out", alias="champion")
    found = promoted(AUTO)
    assert registry.names == "1" and found.text.startswith("Not promoted: version 2 of m was rolled back from")


@pytest.mark.parametrize(
    ("trouble", "requested", "text"),
    [
        (AWAY, True, "Unknown whether m@champion moved to version 2: MLflow could not x"),
        (LOST, True, "Unknown whether m@champion moved to version 2: the lease was lost"),
        (AWAY, False, "Not promoted: this run did not ask m@champion to move: MLflow could not x"),
        (LOST, False, "Not promoted: this run did not ask m@champion to move: the lease was lost"),
        (LeaseError("the lease x was held."), False, "Not promoted: the lease x was held"),
        (TrackingError("MLflow refused."), True, "Not promoted: MLflow refused"),
    ],
)
def test_what_a_registry_answers_or_does_not_is_said_and_kept_for_later(
    registry: Registry, trouble: ValueError, requested: bool, text: str
) -> None:
    registry.trouble, registry.move_requested = trouble, requested
    assert promoted(AUTO) == Promotion(text=text, error=trouble)


def test_a_lease_whose_storage_is_away_is_known_to_have_moved_nothing(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def away(*_: str, **__: str) -> Iterator[Registry]:
        raise AWAY
        yield registry

    monkeypatch.setattr(promotion, "holding", away)
    found = promoted(AUTO)
    assert found.text == "Not promoted: this run did not ask m@champion to move: MLflow could not x"
    assert found.error is AWAY and found.unknown, "it is raised, and the same command goes on"


def test_what_could_not_be_promoted_is_refused_before_anything_is_measured(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(pins: Pins, **how: Any) -> None:
        check_may_promote(pins, str(tmp_path), alias="champion", **how)

    with pytest.raises(
        PinError, match=r"compared with /elsewhere: .*Give --gate\.champion auto, or --gate\.no-promote"
    ):
        check(OTHER, flags="gate.")
    nothing = Pins(candidate="models:/m/2", champion="", base="b", champion_at_start="models:/m/1")
    with pytest.raises(PinError, match=r"compared with no champion: .*Give --champion auto, or --no-promote"):
        check(nothing)
    for usable in (AUTO, FIRST, old(OTHER), Pins(candidate="models:/m/1", champion="", base="",
                   champion_at_start="models:/m/1"), Pins(candidate="/x", champion="", base="")):  # fmt: skip
        check(usable)
    registry.marks = {"champion": "1"}
    with pytest.raises(PinError, match="was rolled back from"):
        check(AUTO)
    check(Pins(candidate="models:/m/1", champion="", base="", champion_at_start="models:/m/1"))  # marked, and reigns
    (tmp_path / PINS_NAME).write_text(json.dumps({"candidate": "models:/m/2"}))
    check(AUTO)  # measured before it was rolled back from: its report is to say so

    def unwritable(name: str, *, output: str) -> None:
        raise LeaseError(f"{name} {output}")

    monkeypatch.setattr(promotion, "check_leases", unwritable)
    with pytest.raises(LeaseError, match=f"m {tmp_path}"):
        check(AUTO)
