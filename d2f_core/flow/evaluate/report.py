"""The results of an evaluation as one self-contained HTML file, without network access or scripts."""

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from PIL import Image

from d2f_core.data.image_decoding import to_rgb
from d2f_core.flow.generate.first_prompts import first_prompts, rows_of
from d2f_core.storage import read_bytes

TEMPLATE = Path(__file__).with_name("report.html.jinja")
COLOURS = {"candidate": "#1f6feb", "champion": "#c2571a", "base": "#6b7280"}
PLOTTED = ("frechet", "kernel", "precision", "recall", "clip_score")
SHOWN_EDGE = 168
"""Stored image size in pixels: twice the displayed size, for high-density screens."""
GRID_WIDTH = 860
"""Width of a row of images on the page, in pixels."""
ENOUGH_IMAGES = 2000


@dataclass(frozen=True, kw_only=True)
class ShownPrompt:
    """A row of the image grid."""

    prompt: str
    images: Mapping[str, tuple[str | None, ...]]
    """Data URIs by role, in increasing number of evaluations; None where sampling failed."""


def shown_images(generations: Mapping[str, str], prompts: int) -> list[ShownPrompt]:
    """The images of the first prompts; of the outputs no more is read than these need.

    Args:
        generations: outputs of generate by role, made from one prompt file.

    Raises:
        ValueError: an output lacks one of the prompts.
    """
    shown = first_prompts(next(iter(generations.values())), prompts)
    by_role = {role: _images_of(role, uri, list(shown)) for role, uri in generations.items()}
    return [
        ShownPrompt(prompt=prompt, images={role: images[name] for role, images in by_role.items()})
        for name, prompt in shown.items()
    ]


def _images_of(role: str, output: str, sample_ids: list[str]) -> dict[str, tuple[str | None, ...]]:
    """Data URIs by sample id, in increasing number of steps."""
    found: dict[str, dict[int, str | None]] = {name: {} for name in sample_ids}
    for row in rows_of(output, sample_ids, ("image_uri",)).to_pylist():
        found[row["sample_id"]][row["steps"]] = row["image_uri"]
    if missing := [name for name, images in found.items() if not images]:
        raise ValueError(f"{role}: {output!r} has no row of sample {missing[0]!r}. Generate from one prompt file.")
    return {name: tuple(_data_uri(uri) for _, uri in sorted(images.items())) for name, images in found.items()}


def _data_uri(uri: str | None) -> str | None:
    if uri is None:
        return None
    image = to_rgb(Image.open(io.BytesIO(read_bytes(uri))))
    if max(image.size) > SHOWN_EDGE:
        image.thumbnail((SHOWN_EDGE, SHOWN_EDGE), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    image.save(sink, format="WEBP", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(sink.getvalue()).decode()}"


def render_report(results: Mapping[str, Any], shown: list[ShownPrompt]) -> str:
    """The HTML page for the contents of metrics.json."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined, trim_blocks=True)
    environment.filters["number"] = number
    return environment.from_string(TEMPLATE.read_text()).render(
        results=results,
        candidate=next(model for model in results["models"] if model["role"] == "candidate"),
        verdict=results["gate"]["verdict"],
        shown=shown,
        groups=[model["role"] for model in results["models"]],
        plots=[
            plot(results["metrics"][name], results["evaluations"]) for name in PLOTTED if name in results["metrics"]
        ],
        cell=cell,
        best=best,
        note=note(results),
        edge=image_edge(len(results["models"]), len(results["evaluations"])),
    )


def image_edge(groups: int, columns: int) -> int:
    """Height and width in pixels of an image in the grid, so that a row's images fit beside their caption."""
    return max(36, min(112, (GRID_WIDTH - 18 * groups) // (groups * columns) - 6))


def number(value: float | None) -> str:
    """Format a value with four significant digits; a dash if it was not measured."""
    return "-" if value is None else f"{value:.4g}"


def cell(estimate: Mapping[str, Any]) -> markupsafe.Markup:
    """Table cell with a value above its interval."""
    interval = f"{number(estimate['low'])} to {number(estimate['high'])}"
    if estimate["low"] == estimate["high"]:
        interval = f"of {estimate['count']}"
    return markupsafe.Markup('{}<span class="interval">{}</span>').format(number(estimate["value"]), interval)


def best(metric: Mapping[str, Any], count: int) -> str | None:
    """The role with the best value at a number of evaluations; None unless one is better than all others."""
    there = {
        role: values[str(count)]["value"]
        for role, values in metric["values"].items()
        if str(count) in values and values[str(count)]["value"] is not None
    }
    if len(set(there.values())) < 2:
        return None
    return (max if metric["higher_is_better"] else min)(there, key=lambda role: there[role])


def note(results: Mapping[str, Any]) -> str:
    """Note on how to read the figures."""
    text = (
        "A Fréchet distance is biased upward by few images and depends on the feature network: compare figures of this "
        "page with each other, and with the floor, what fresh images of the reference's own distribution would have."
    )
    fewest = min(results["prompts"]["count"], results["reference"]["count"])
    if fewest < ENOUGH_IMAGES:
        text += f" With {fewest} images, fewer than {ENOUGH_IMAGES}, the bias is large."
    return text


def plot(metric: Mapping[str, Any], evaluations: list[int]) -> str:
    """One metric against network evaluations, with its intervals, as an SVG element."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for role, values in metric["values"].items():
        counts = [count for count in evaluations if str(count) in values]
        points = [values[str(count)] for count in counts]
        colour = COLOURS.get(role, "black")
        low, high, middle = (
            [math.nan if point[end] is None else point[end] for point in points] for end in ("low", "high", "value")
        )
        axes.fill_between(counts, low, high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(counts, middle, "o-", color=colour, markersize=4.5)
    if metric["floor"]:
        axes.axhline(metric["floor"]["value"], color="#1c2127", linestyle=(0, (4, 3)), linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(evaluations, [str(count) for count in evaluations])
    axes.minorticks_off()
    axes.set_xlabel("network evaluations", color="#66707b")
    better = "higher" if metric["higher_is_better"] else "lower"
    axes.set_title(f"{metric['title']} ({better} is better)", loc="left", fontsize=11, fontweight="bold")
    axes.grid(axis="y", color="#e1e5ea", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors="#66707b", length=0)
    axes.set_axisbelow(True)
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})
    text = sink.getvalue()
    return text[text.index("<svg") :]
