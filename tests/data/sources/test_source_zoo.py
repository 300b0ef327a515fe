"""What docs/sources.md says of each layout is what becomes of it."""

import re
from pathlib import Path

import pytest

from d2f_core.data.sources.config import ImageSource
from d2f_core.data.sources.images import plan_images
from d2f_core.data.sources.sample import SourceError
from tests.data.sources.source_zoo import KINDS, A, B, Layout, table

LAYOUTS = [pytest.param(layout, id=f"{kind}: {layout.name}") for kind in KINDS for layout in KINDS[kind]]


def fate(uri: str, layout: Layout) -> tuple[str, str]:
    """What becomes of a layout, and the reasons."""
    try:
        shards = plan_images(ImageSource(uri=uri, **layout.settings)).shards
    except SourceError as error:
        return "refused", str(error)
    samples = [sample for shard in shards for sample in shard.read()]
    reasons = [f"{s.source_uri}: {s.problem or 'no_caption'}" for s in samples if s.problem or s.caption is None]
    if not reasons:
        assert sorted((s.image, s.caption) for s in samples) == sorted([(A, "a cat"), (B, "a dog")])
    return "ledger" if reasons else "read", "; ".join(reasons)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_becomes_what_the_page_says(layout: Layout, tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    layout.make(root)
    becomes, reasons = fate(str(root), layout)
    assert becomes == layout.becomes, reasons
    if becomes != "read":
        word = re.match("`([^`]*)`", layout.detail)
        assert word and word[1] in reasons


def test_the_table_of_the_page_has_every_layout() -> None:
    page = Path(__file__).parents[3] / "docs/sources.md"
    assert table() in page.read_text(), "Print it by `python -m tests.data.sources.source_zoo`."
