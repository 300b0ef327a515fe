"""The contact sheet shows every image in its row and column, and refuses generations that do not belong together."""

import io
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from d2f_core.flow.generate.contact_sheet import (
    CAPTION_WIDTH,
    GAP,
    GROUP_GAP,
    MARGIN,
    Group,
    _font,
    _wrap,
    contact_sheet,
    explained,
    group_from_table,
)

COLOURS = ["red", "lime", "blue", "yellow"]


def solid(colour: str) -> Image.Image:
    return Image.new("RGB", (8, 8), colour)


def test_each_image_stands_in_its_row_and_column() -> None:
    groups = [
        Group(title="base", columns={2: [solid("red"), solid("lime")], 4: [solid("blue"), None]}),
        Group(title="flow", columns={2: [solid("yellow"), solid("red")]}),
    ]
    sheet = contact_sheet("title", ["one", "two"], groups, cell=40)
    height = sheet.height - MARGIN

    def at(group: int, column: int, row: int) -> tuple[int, ...]:
        x = MARGIN + CAPTION_WIDTH + (group + 1) * GROUP_GAP + column * (40 + GAP) + 5
        pixel = sheet.getpixel((x, height - (2 - row) * (40 + GAP) + 5))
        assert isinstance(pixel, tuple)
        return pixel

    assert at(0, 0, 0) == (255, 0, 0) and at(0, 0, 1) == (0, 255, 0) and at(0, 1, 0) == (0, 0, 255)
    assert at(1, 2, 0) == (255, 255, 0) and at(1, 2, 1) == (255, 0, 0)
    assert at(0, 1, 1) == (255, 255, 255)


@pytest.mark.parametrize("text", ["cat", "man in manual wheelchair facing right " * 5, "pneumono" * 12])
def test_captions_fit_their_column(text: str) -> None:
    font = _font(14)
    lines = _wrap(text, font, CAPTION_WIDTH, 5)
    assert 1 <= len(lines) <= 5 and all(font.getlength(line) <= CAPTION_WIDTH for line in lines)


def index(tmp_path: Path, rows: list[tuple[str, int, str | None]]) -> pa.Table:
    made = []
    for name, evaluations, colour in rows:
        uri = str(tmp_path / f"{name}-{evaluations}.png")
        if colour:
            sink = io.BytesIO()
            solid(colour).save(sink, format="PNG")
            Path(uri).write_bytes(sink.getvalue())
        made.append({"sample_id": name, "num_evaluations": evaluations, "image_uri": uri if colour else None})
    return pa.Table.from_pylist(made)


def test_columns_are_sorted_by_evaluations_and_rows_by_sample(tmp_path: Path) -> None:
    table = index(tmp_path, [("a", 10, "red"), ("b", 10, None), ("b", 2, "blue"), ("a", 2, "lime")])
    group = group_from_table("flow", table, ["b", "a"])
    assert list(group.columns) == [2, 10]
    pixels = [[image and image.getpixel((0, 0)) for image in images] for images in group.columns.values()]
    assert pixels == [[(0, 0, 255), (0, 255, 0)], [None, (255, 0, 0)]]


def test_generations_of_other_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="flow: no image of sample 'b' at 2 evaluations"):
        group_from_table("flow", index(tmp_path, [("a", 2, "red")]), ["a", "b"])


def test_a_sheet_says_what_its_columns_cost_where_there_are_several() -> None:
    one = Group(title="flow", columns={4: [solid("red")]})
    assert explained([one]) == ["Each row is one prompt, drawn by all models from the same noise."]
    text = " ".join(explained([one, Group(title="base", columns={50: [solid("red")]})]))
    assert "4 is 12.5 times faster than 50" in text
