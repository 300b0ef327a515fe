"""What other releases made of the exports is judged rightly, and the page shows what was found last."""

import re
from pathlib import Path

import pytest
import torch

from tests.versions.cases import NO_BIAS, NO_FLOW, Case, Unread
from tests.versions.environments import ENVIRONMENTS
from tests.versions.outcomes import judge, read, table

PAGE = Path(__file__).parents[2] / "docs/models.md"
CASE = {"name": "one", "reader": "unet_directory", "arguments": {}, "expected": torch.ones(1)}


OLD = Unread(reason="it is old", error="ValueError: no flow")


@pytest.mark.parametrize(
    ("more", "line", "word", "unexpected"),
    [
        ({}, {"difference": 1e-6}, "equal", False),
        ({}, {"difference": 0.1}, "differs", True),
        ({}, {"difference": float("nan")}, "differs", True),
        ({}, {"error": "KeyError: 'x'"}, "fails", True),
        ({"refused": "needs d2f_core"}, {"error": "ValueError: needs\nd2f_core"}, "fails", True),
        ({"refused": "needs.*d2f_core"}, {"error": "ValueError: needs\nd2f_core"}, "refused", False),
        ({"refused": "needs d2f_core"}, {"difference": 0.0}, "differs", True),
        ({"unread_in": {"old": OLD}}, {"error": "ValueError: no flow here"}, "unread", False),
        ({"unread_in": {"old": OLD}}, {"error": "ImportError: libtorch"}, "fails", True),
        ({"unread_in": {"old": OLD}}, {"difference": 0.1}, "differs", True),
        ({"unread_in": {"old": OLD}}, {"difference": 1e-6}, "differs", True),
        ({"unread_in": {"new": OLD}}, {"difference": 1e-6}, "equal", False),
    ],
)
def test_an_export_that_opens_otherwise_than_it_should_is_seen(more, line, word, unexpected) -> None:
    outcome = judge("old", Case(**CASE, **more), line)
    assert (outcome.word, outcome.unexpected) == (word, unexpected)


def test_what_was_found_unread_last_says_the_expected() -> None:
    known = {each.reason: each.error for unread_in in (NO_BIAS, NO_FLOW) for each in unread_in.values()}
    said = [outcome.said.split(" (", 1) for outcome in read() if outcome.word == "unread"]
    assert said and all(re.search(known[reason], error) for reason, error in said)


def test_the_page_shows_what_was_found_last() -> None:
    found = read()
    assert {outcome.environment for outcome in found} == set(ENVIRONMENTS) and not any(o.unexpected for o in found)
    assert table(found) in PAGE.read_text(), "run `make check-versions`, and put its table on the page"
