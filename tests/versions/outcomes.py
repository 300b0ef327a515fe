"""Judges what other releases made of the exports, as a table and as a file."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.versions.cases import Case

RESULTS = Path(__file__).parents[2] / "docs/results/versions.json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    environment: str
    case: str
    word: str
    """`equal`; `refused`, as should be; `unread`, for a known reason; `differs`; `fails`."""
    said: str
    """The largest difference of outputs as a share of the largest output, or the message."""

    @property
    def unexpected(self) -> bool:
        return self.word in ("differs", "fails")


def judge(environment: str, case: Case, line: Mapping[str, Any]) -> Outcome:
    """Compare what `opening.py` printed of a case with what should come of it."""
    error, difference, unread = line.get("error"), line.get("difference"), case.unread_in.get(environment)
    wanted, expected = (unread.error, "unread") if unread else (case.refused, "refused")
    if error is not None:
        word = expected if wanted and re.search(wanted, error, re.DOTALL) else "fails"
        said = " ".join(error.split())[:300]
    else:
        share = difference / max(case.expected.float().abs().max().item(), 1e-9)
        word, said = ("equal" if share <= case.within and not wanted else "differs"), f"{share:.0e}"
    if unread:
        said = f"{unread.reason} ({said})"
    return Outcome(environment=environment, case=case.name, word=word, said=said)


def table(outcomes: Iterable[Outcome]) -> str:
    """A Markdown table of formats by environments."""
    found = {(outcome.case, outcome.environment): outcome for outcome in outcomes}
    environments = list(dict.fromkeys(environment for _, environment in found))
    lines = [["opened", *environments], ["---"] * (len(environments) + 1)]
    for case in dict.fromkeys(case for case, _ in found):
        cells = [found.get((case, environment)) for environment in environments]
        lines.append([case, *(_cell(cell) for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    return {"equal": f"equal, {outcome.said}", "unread": "no"}.get(outcome.word, outcome.word)


def write(outcomes: Sequence[Outcome], circumstances: Mapping[str, str]) -> None:
    """Write all outcomes to docs/results/versions.json."""
    content = {**circumstances, "outcomes": [asdict(outcome) for outcome in outcomes]}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def read() -> list[Outcome]:
    """The outcomes that were written last."""
    return [Outcome(**outcome) for outcome in json.loads(RESULTS.read_text())["outcomes"]]
