"""A comparison of matchers as one self-contained HTML file, without network access or scripts."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from PIL import Image

from d2f_core.correspondence.evaluate.answers import EXACT, FLOOR

TEMPLATE = Path(__file__).with_name("report.html.jinja")
COLOURS = (
    "#b4bcc4", "#8d96a0", "#6b7280", "#3d444d", "#1f6feb", "#c2571a", "#17713f", "#8250df", "#b3261e", "#0e7c86",
    "#9a6700", "#cf222e", "#5b3a29",
)  # fmt: skip
"""The first four are the floors'."""
PLOT = (640, 300)
MARGIN = (46, 12, 34, 34)
"""Left, right, top, bottom."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    picture: Image.Image
    text: str


def render_report(result: Mapping[str, Any], shown: Mapping[str, Sequence[Shown]], *, source: str, model: str) -> str:
    """The page.

    Args:
        shown: drawings by their heading.
        source: of the pairs.
        model: name of the matcher in the drawings.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": percent, "signed": lambda value: percent(value, sign="+")}
    rows = result["rows"]
    ranges = list(dict.fromkeys(name for row in rows for name in row["by_viewpoint"]))
    pictures = {title: [(_data_uri(each.picture), each.text) for each in some] for title, some in shown.items()}
    others = list(dict.fromkeys(row["decoding"] for row in rows if row["decoding"] not in (EXACT, FLOOR)))
    return environment.from_string(TEMPLATE.read_text()).render(
        result=result, source=source, model=model, ranges=ranges, pictures=pictures, others=others, gains=gains(rows),
        plot=markupsafe.Markup(curves([row for row in rows if row["decoding"] in (EXACT, FLOOR)])),
    )  # fmt: skip


def percent(value: float | None, sign: str = "") -> str:
    """Of a share, with one decimal; a dash where there is none."""
    if value is None or value != value:
        return "-"
    return f"{round(100 * value, 1) + 0.0:{sign}.1f}"  # -0.0 + 0.0 is 0.0


def gains(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each matcher its PCK by point at each alpha with exact decoding, and what each other decoding adds to it."""
    values = {(row["name"], row["decoding"]): [each["value"] for each in row["protocols"]["original"]["point"]]
              for row in rows}  # fmt: skip
    exact = {name: found for (name, decoding), found in values.items() if decoding == EXACT}
    return [
        {
            "name": name,
            "exact": found,
            "added": {
                decoding: [value - base for value, base in zip(other, found, strict=True)]
                for (its, decoding), other in values.items()
                if its == name and decoding != EXACT
            },
        }
        for name, found in exact.items()
    ]


def _data_uri(image: Image.Image) -> str:
    sink = io.BytesIO()
    image.save(sink, format="WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(sink.getvalue()).decode()}"


def curves(rows: Sequence[Mapping[str, Any]]) -> str:
    """PCK over alpha as an SVG: floors dashed."""
    (width, height), (left, right, top, bottom) = PLOT, MARGIN
    most = max(alpha for row in rows for alpha, _ in row["curve"])

    def at(alpha: float, value: float) -> str:
        x = left + alpha / most * (width - left - right)
        return f"{x:.1f},{height - bottom - value * (height - top - bottom):.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="PCK over alpha">']
    for step in range(0, 101, 25):
        x, y = at(0, step / 100).split(",")
        parts.append(f'<line x1="{x}" y1="{y}" x2="{width - right}" y2="{y}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{step}</text>')
    for number in range(5):
        alpha = most * number / 4
        x, y = at(alpha, 0).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 18:.1f}" text-anchor="middle">{alpha:.2f}</text>')
    for number, row in enumerate(rows):
        points = " ".join(at(alpha, value) for alpha, value in row["curve"])
        dashed = ' stroke-dasharray="5 4"' if row["decoding"] == "floor" else ""
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dashed}/>')
    return "".join([*parts, "</svg>", _legend(rows)])


def _legend(rows: Sequence[Mapping[str, Any]]) -> str:
    entries = [
        f'<span><i style="border-top: 3px {"dashed" if row["decoding"] == "floor" else "solid"} '
        f'{COLOURS[number % len(COLOURS)]}"></i>{markupsafe.escape(row["name"])}</span>'
        for number, row in enumerate(rows)
    ]
    return f'<p class="legend small">{"".join(entries)}</p>'
