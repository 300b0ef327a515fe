"""Two pictures of a depth evaluation: errors against network evaluations, and a contact sheet of maps."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2f_core.evaluation.estimates import Metric
from d2f_core.flow.depth.config import FLOORS
from d2f_core.flow.depth.ensemble import coloured
from d2f_core.flow.depth.errors import aligned
from d2f_core.flow.depth.protocol import Protocol

PLOTTED = ("abs_rel", "delta1", "rmse", "silog")
COLOURS = ("#0b6e4f", "#3b5b92", "#b5651d", "#7b3f8c")
FLOOR_STYLES = dict(zip(FLOORS, (":", "-.", "--"), strict=True))


@dataclass(frozen=True, kw_only=True)
class ShownDepth:
    """A row of the sheet."""

    image: np.ndarray
    """uint8 [height, width, 3]."""
    truth: np.ndarray
    """Metres [height, width], NaN where depth is unknown."""
    predictions: Mapping[str, np.ndarray]
    """Predicted maps by column heading."""


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=110, metadata={"Software": None})
    return sink.getvalue()


def draw_errors(metrics: Mapping[str, Metric], title: str) -> bytes:
    """A PNG of the errors: each model's curve with its intervals, the baselines as lines."""
    figure = _figure(11, 7)
    figure.suptitle(title, fontsize=10)
    for number, name in enumerate(PLOTTED):
        metric, axes = metrics[name], figure.add_subplot(2, 2, number + 1)
        models = [role for role in metric.values if role not in FLOORS]
        for role, colour in zip(models, COLOURS * len(models), strict=False):
            counts = sorted(metric.values[role])
            found = [metric.values[role][count] for count in counts]
            axes.fill_between(counts, [one.low for one in found], [one.high for one in found], color=colour, alpha=0.15)
            axes.plot(counts, [one.value for one in found], "o-", color=colour, ms=4, label=role)
        for role, style in FLOOR_STYLES.items():
            if role in metric.values:
                axes.axhline(metric.values[role][0].value, color="#555555", ls=style, lw=1, label=f"floor: {role}")
        ticks = sorted({count for role in models for count in metric.values[role]})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(count) for count in ticks])
        axes.minorticks_off()
        better = "higher" if metric.higher_is_better else "lower"
        axes.set(xlabel="network evaluations", title=f"{metric.title} ({better} is better)")
        axes.grid(alpha=0.25)
        if number == 0:
            axes.legend(fontsize=8)
    return _png(figure)


def draw_maps(rows: Sequence[ShownDepth], title: str, protocol: Protocol | None = None) -> bytes:
    """A PNG with image, truth and predictions per row; all maps of a row share the colour scale of the truth."""
    headings = ["image", "truth", *rows[0].predictions]
    heights = [row.truth.shape[0] / row.truth.shape[1] for row in rows]
    figure = _figure(1.6 * len(headings), 1.6 * sum(heights) + 0.8)
    grid = figure.add_gridspec(len(rows), len(headings), height_ratios=heights)
    figure.suptitle(textwrap.fill(title, 18 * len(headings)), fontsize=9)
    for number, row in enumerate(rows):
        truth = row.truth
        low, high = np.nanmin(truth), np.nanmax(truth)
        fitted = [np.clip(aligned(values, truth, protocol), low, high) for values in row.predictions.values()]
        # Every map contains the ends of the truth's scale, so that all are coloured by the same scale.
        maps = [coloured(np.concatenate([values, np.full_like(values[:1], low), np.full_like(values[:1], high)]))[:-2]
                for values in (truth, *fitted)]  # fmt: skip
        for column, picture in enumerate([row.image, *maps]):
            axes = figure.add_subplot(grid[number, column])
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
            if number == 0:
                axes.set_title(headings[column], fontsize=9)
    return _png(figure)
