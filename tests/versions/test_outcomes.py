"""What other releases made of the exports is judged rightly, and the page shows what was found last."""

from pathlib import Path

import pytest
import torch

from tests.versions.cases import Case
from tests.versions.environments import ENVIRONMENTS
from tests.versions.outcomes import judge, read, table

PAGE = Path(__file__).parents[2] / "docs/models.md"
CASE = {"name": "one", "reader": "unet_directory", "arguments": {}, "expected": torch.ones(1)}


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
        ({"lost_in": {"old": "it is old"}}, {"difference": 0.1}, "lost", False),
        ({"lost_in": {"old": "it is old"}}, {"error": "ValueError"}, "lost", False),
        ({"lost_in": {"old": "it is old"}}, {"difference": 1e-6}, "differs", True),
    ],
)
def test_an_export_that_opens_otherwise_than_it_should_is_seen(more, line, word, unexpected) -> None:
    outcome = judge("old", Case(**CASE, **more), line)
    assert (outcome.word, outcome.unexpected) == (word, unexpected)


def test_the_page_shows_what_was_found_last() -> None:
    found = read()
    assert {outcome.environment for outcome in found} == set(ENVIRONMENTS) and not any(o.unexpected for o in found)
    assert table(found) in PAGE.read_text(), "run `make check-versions`, and put its table on the page"
