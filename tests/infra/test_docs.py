"""Links of the pages lead somewhere, and the page about the code is what the code says."""

import re
from pathlib import Path

import pytest

from infra import code_page

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    plain = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_the_page_about_the_code_is_what_the_code_says() -> None:
    assert code_page.PAGE.read_text() == code_page.page(), "run `make docs`"


def test_every_file_says_what_it_is_for() -> None:
    files = [file for room in code_page.ROOMS for file in (ROOT / room).rglob("*.py") if file.name != "__init__.py"]
    assert not [str(file.relative_to(ROOT)) for file in files if len(code_page.phrase(file)) < 20]


def test_the_readme_is_short_enough_to_be_read() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130 and sum(len(line.split()) for line in lines) <= 1200
