"""Bounds that are stated once: asserted, and printed with what was found as the table of docs/objective.md."""

from collections.abc import Callable

import pytest

Holds = Callable[[str, object, float], None]
FOUND = pytest.StashKey[dict[str, tuple[float, float]]]()


@pytest.fixture
def holds(request: pytest.FixtureRequest) -> Holds:
    """`holds(claim, found, bound)`: at most the bound; the largest number of each claim is printed at the end."""
    table = request.config.stash.setdefault(FOUND, {})

    def check(claim: str, found: object, bound: float) -> None:
        number = float(found)  # type: ignore[arg-type]
        table[claim] = (max(number, table.get(claim, (0.0,))[0]), bound)
        assert number <= bound, f"{claim}: {number:.3g} is above {bound:g}"

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if table := config.stash.get(FOUND, {}):
        terminalreporter.section("bounds of the objective")
        for claim, (found, bound) in table.items():
            terminalreporter.write_line(f"| {claim} | {bound:g} | {found:.1e} |")
