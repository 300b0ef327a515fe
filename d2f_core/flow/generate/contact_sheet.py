"""One picture that compares models: the same prompts and noise, sampled with increasing numbers of network
evaluations.
"""

import functools
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from d2f_core.flow.generate.config import ContactSheetConfig
from d2f_core.flow.generate.first_prompts import first_prompts, rows_of
from d2f_core.storage import check_reachable, read_bytes, write_bytes
from d2f_core.tracking import RunHandle, find_run

CAPTION_WIDTH = 260
GAP = 8
GROUP_GAP = 36
MARGIN = 28
TITLE_SIZE, HEADER_SIZE, TEXT_SIZE, SMALL_SIZE = 32, 24, 22, 18
LINE_GAP = 8
COLUMNS = ("num_evaluations", "image_uri", "model_uri", "solver")
INK, MUTED, PAPER, RULE = (25, 25, 25), (105, 105, 105), (255, 255, 255), (200, 200, 200)


@dataclass(frozen=True, kw_only=True)
class ContactSheetJob:
    """A sheet whose parts were found, and are ready to be drawn."""

    config: ContactSheetConfig
    captions: Mapping[str, str]
    """The shown prompts by sample id."""
    tables: Sequence[pa.Table]
    """Index rows of these prompts, of each generation."""
    run: RunHandle | None
    """Run in MLflow that gets the sheet."""


def check_contact_sheet(config: ContactSheetConfig) -> ContactSheetJob:
    """Look for the generations, and for the run that gets the sheet.

    Raises:
        ValueError: no or unfinished generations, an output that cannot be written, or no such run.
    """
    if not config.generations or not config.output:
        raise ValueError("generations or output is empty. Give --generations URI URI and --output FILE.png.")
    check_reachable(config.output.rpartition("/")[0], write=True)
    captions = first_prompts(config.generations[0], config.max_rows)
    tables = [rows_of(uri, list(captions), COLUMNS) for uri in config.generations]
    for uri, table in zip(config.generations, tables, strict=True):
        if captions and not table.num_rows:
            raise ValueError(
                f"{uri!r} has none of the first prompts of {config.generations[0]!r}. Compare generations that were "
                "made from the same prompt file."
            )
    run = find_run(experiment=config.experiment, run_key=config.run) if config.run else None
    if config.run and run is None:
        raise ValueError(f"MLflow has no run of {config.run!r} in {config.experiment!r}. Correct one of them.")
    return ContactSheetJob(config=config, captions=captions, tables=tables, run=run)


def make_contact_sheet(job: ContactSheetJob) -> str:
    """Draw, write and log the sheet; returns its URI.

    Raises:
        ValueError: generations of different prompts.
    """
    config, tables = job.config, job.tables
    titles = config.titles or [f"{table['model_uri'][0]}, {table['solver'][0]}" for table in tables]
    groups = [group_from_table(title, table, list(job.captions)) for title, table in zip(titles, tables, strict=True)]
    sheet = contact_sheet(config.title, list(job.captions.values()), groups, cell=config.cell)
    sink = io.BytesIO()
    sheet.save(sink, format="PNG")
    write_bytes(config.output, sink.getvalue())
    if job.run:
        job.run.log_image("contact_sheet", sheet, 0)
    return config.output


@dataclass(frozen=True, kw_only=True)
class Group:
    """The columns of one model."""

    title: str
    columns: Mapping[int, Sequence[Image.Image | None]]
    """Network evaluations -> one image per caption; None where sampling failed."""


def group_from_table(title: str, index: pa.Table, sample_ids: Sequence[str]) -> Group:
    """The images of a generation index, in the order of `sample_ids`.

    Raises:
        ValueError: the index has no row for a sample at some number of evaluations.
    """
    rows = {(row["num_evaluations"], row["sample_id"]): row for row in index.to_pylist()}
    columns: dict[int, list[Image.Image | None]] = {}
    for evaluations in sorted({evaluations for evaluations, _ in rows}):
        missing = [name for name in sample_ids if (evaluations, name) not in rows]
        if missing:
            raise ValueError(
                f"{title}: no image of sample {missing[0]!r} at {evaluations} evaluations. Compare generations "
                "that were made from the same prompt file with the same steps."
            )
        columns[evaluations] = [_open(rows[evaluations, name]["image_uri"]) for name in sample_ids]
    return Group(title=title, columns=columns)


def _open(uri: str | None) -> Image.Image | None:
    return None if uri is None else Image.open(io.BytesIO(read_bytes(uri))).convert("RGB")


def contact_sheet(title: str, captions: Sequence[str], groups: Sequence[Group], *, cell: int = 160) -> Image.Image:
    """Rows are captions, columns are `groups` side by side, each headed by its number of network evaluations.

    Below that number is the difference between the column's images and those of the group's last column; the head of
    the sheet explains it.

    Args:
        cell: height and width in pixels of one image on the sheet; images of another size are resampled.
    """
    columns = sum(len(group.columns) for group in groups)
    width = 2 * MARGIN + CAPTION_WIDTH + columns * (cell + GAP) + len(groups) * GROUP_GAP
    said = [line for text in explained(groups) for line in _wrap(text, _font(TEXT_SIZE), width - 2 * MARGIN, 3)]
    top = MARGIN + TITLE_SIZE + (len(said) + 1) * (TEXT_SIZE + LINE_GAP) + 2 * HEADER_SIZE + SMALL_SIZE + 7 * LINE_GAP
    sheet = Image.new("RGB", (width, top + len(captions) * (cell + GAP) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=_font(TITLE_SIZE))
    for number, line in enumerate(said):
        y = MARGIN + TITLE_SIZE + 2 * LINE_GAP + number * (TEXT_SIZE + LINE_GAP)
        draw.text((MARGIN, y), line, fill=MUTED, font=_font(TEXT_SIZE))
    heads = (
        ("network evaluations", HEADER_SIZE, SMALL_SIZE + 2 * LINE_GAP),
        ("off the last column", SMALL_SIZE, LINE_GAP),
    )
    for text, size, above in heads:
        draw.text((MARGIN, top - above), text, fill=MUTED, font=_font(size), anchor="ls")
    for row, caption in enumerate(captions):
        _caption(draw, caption, top + row * (cell + GAP), cell)
    left = MARGIN + CAPTION_WIDTH
    for group in groups:
        left += GROUP_GAP
        _group(sheet, draw, group, left, top, cell)
        left += len(group.columns) * (cell + GAP)
    return sheet


def explained(groups: Sequence[Group]) -> list[str]:
    """Lines that explain the columns to a first-time reader."""
    counts = sorted({evaluations for group in groups for evaluations in group.columns})
    if len(counts) < 2:
        return ["Each row is one prompt, drawn by all models from the same noise."]
    least, most = counts[0], counts[-1]
    return [
        "Each row is one prompt, drawn from the same noise. A column's number says how often the network runs for an "
        f"image, and that is what an image costs: {least} is {most / least:g} times faster than {most}.",
        "The smaller the percentage below it, the less is lost against the last column: a model whose fast columns "
        "look like its slow ones saves that time for good.",
    ]


def off_the_last(columns: Mapping[int, Sequence[Image.Image | None]]) -> dict[int, float]:
    """Mean absolute pixel difference to the images with the most evaluations, as a share of the pixel range."""
    last = columns[max(columns)]
    found = {}
    for evaluations, images in columns.items():
        pairs = [(one, other) for one, other in zip(images, last, strict=True) if one and other]
        each = [
            np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean() / 255 for one, other in pairs
        ]
        found[evaluations] = float(np.mean(each)) if each else float("nan")
    return found


def _group(sheet: Image.Image, draw: ImageDraw.ImageDraw, group: Group, left: int, top: int, cell: int) -> None:
    right = left + len(group.columns) * (cell + GAP) - GAP
    line = top - HEADER_SIZE - SMALL_SIZE - 4 * LINE_GAP
    draw.text(((left + right) / 2, line - LINE_GAP), group.title, fill=INK, font=_font(HEADER_SIZE), anchor="ms")
    draw.line((left, line, right, line), fill=RULE, width=2)
    off = off_the_last(group.columns)
    for column, (evaluations, images) in enumerate(group.columns.items()):
        x = left + column * (cell + GAP)
        middle, under = x + cell / 2, SMALL_SIZE + 2 * LINE_GAP
        draw.text((middle, top - under), str(evaluations), fill=INK, font=_font(HEADER_SIZE), anchor="ms")
        if evaluations != max(group.columns) and not math.isnan(off[evaluations]):
            text = f"{off[evaluations]:.1%}"
            draw.text((middle, top - LINE_GAP), text, fill=MUTED, font=_font(SMALL_SIZE), anchor="ms")
        for row, image in enumerate(images):
            y = top + row * (cell + GAP)
            if image is None:
                draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=RULE)
                draw.text((x + cell / 2, y + cell / 2), "failed", fill=MUTED, font=_font(TEXT_SIZE), anchor="mm")
            else:
                sheet.paste(image.resize((cell, cell), Image.Resampling.LANCZOS), (x, y))


def _caption(draw: ImageDraw.ImageDraw, caption: str, y: int, cell: int) -> None:
    font, line_height = _font(TEXT_SIZE), TEXT_SIZE + LINE_GAP
    lines = _wrap(caption, font, CAPTION_WIDTH, cell // line_height)
    start = y + (cell - len(lines) * line_height) / 2
    for number, line in enumerate(lines):
        draw.text((MARGIN, start + number * line_height), line, fill=INK, font=font)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Break at words so that every line fits `width` pixels; text beyond `max_lines` is cut with an ellipsis."""
    characters = max(1, int(width / font.getlength("i")))
    lines = textwrap.wrap(text, characters)
    while any(font.getlength(line) > width for line in lines) and characters > 1:
        characters -= 1
        lines = textwrap.wrap(text, characters)
    return lines if len(lines) <= max_lines else [*lines[: max_lines - 1], f"{lines[max_lines - 1][:-1]}…"]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
