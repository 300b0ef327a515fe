"""Tests that `make test-slow` runs and `make test` does not: long repetitions of what a small case shows as well."""

import pytest


def slow(reason: str) -> pytest.MarkDecorator:
    """Leave the test out of an ordinary run. `reason`: how long it takes, and which small case stays."""
    return pytest.mark.slow(reason)
