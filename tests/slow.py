"""Tests that `D2F_SLOW=1 make test` runs beside the others: each takes more than a minute on two cores."""

import os

import pytest


def slow(reason: str) -> pytest.MarkDecorator:
    """Leave the test out of an ordinary run."""
    return pytest.mark.skipif("D2F_SLOW" not in os.environ, reason=f"{reason}; D2F_SLOW=1 runs it")
