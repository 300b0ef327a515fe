"""Draw the results of `benchmarks.objectives`: quality against steps and against network evaluations.

python -m benchmarks.objectives_plot --results docs/results/objectives.jsonl --output docs/objectives.png
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.frechet import NAME
from benchmarks.objectives import TUNING, Config

COLOURS = {
    "diff2flow": "#0b6e4f",
    "naive": "#b5651d",
    "naive_logit_normal": "#8c2f5b",
    "published": "#9a9a9a",
    "diffusion": "#3b5b92",
}
NAMES = {
    "naive": "naive, noise - data",
    "naive_logit_normal": "naive, noise - data, logit-normal",
    "published": "naive, data - noise (published)",
}
TITLES = {"full": "full finetuning", "small": "LoRA small", "attention": "LoRA attention"}


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    results: Path
    output: Path
    title: str = "emoji-sd adapts to OpenMoji"


def size_of(line: Mapping[str, Any]) -> int:
    """Of the images in pixels."""
    return line["of"].get("size", Config.size)


def by_evaluations(values: Mapping[str, float]) -> tuple[list[int], list[float]]:
    return [int(count) for count in values], list(values.values())


def at_ten(curve: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    return [point["step"] for point in curve], [point[NAME]["10"] for point in curve]


def trained_lines(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those to draw: at the rates that were chosen, or where none were chosen, at the usual ones."""
    chosen = any("tuned" in line["of"] for line in lines)
    drawn = (lambda of: "tuned" in of) if chosen else (lambda of: not set(TUNING) & set(of))
    return [line for line in lines if "curve" in line and drawn(line["of"])]


def draw_base(steps: Any, counts: Any, base: Sequence[Mapping[str, Any]]) -> None:
    """The untrained base as horizontal lines and curves."""
    ddim = [row[NAME]["10"] for row in base if row["what"].startswith("ddim")]
    steps.axhspan(min(ddim), max(ddim), color="#bbbbbb", alpha=0.6, lw=0, label="base, DDIM (three noise sets)")
    steps.axhline(base[1][NAME]["10"], color="#555555", ls=":")
    for row, style in zip((base[0], base[1], _row(base, "step 0")), ("--", ":", "-."), strict=True):
        counts.plot(*by_evaluations(row[NAME]), color="#555555", ls=style, label=f"base, {row['what']}")


def draw_training(panels: Sequence[Any], base: Sequence[Mapping[str, Any]], line: Mapping[str, Any]) -> None:
    """One training in the three panels; from step 0 where it begins as the base read as a flow."""
    steps, counts, losses = panels
    objective, shift, curve = line["of"]["objective"], line["of"].get("shift", 1), line["curve"]
    name = NAMES.get(objective, objective)
    style = {"color": COLOURS[objective], "marker": "o", "ms": 3.5, "ls": "-" if shift == 1 else "--"}
    style["label"] = name if shift == 1 else f"{name}, shifted times"
    x, y = at_ten(curve)
    begins = objective == "diff2flow"
    start = _row(base, "step 0" if begins or objective == "diffusion" else f"step 0, read as {objective.split('_')[0]}")
    steps.plot([0, *x] if begins else x, [start[NAME]["10"], *y] if begins else y, **style)
    counts.plot(*by_evaluations(curve[-1][NAME]), **style)
    known = [start["flow_loss"]] if start else []
    losses.plot([0, *x][-len(x) - len(known) :], [*known, *(point["flow_loss"] for point in curve)], **style)


def _row(base: Sequence[Mapping[str, Any]], what: str) -> Mapping[str, Any]:
    return next((row for row in base if row["what"] == what), {})


def label_axes(panels: Sequence[Any], title: str) -> None:
    steps, counts, losses = panels
    labels = (
        (steps, "training steps", "distance at 10 network evaluations"),
        (counts, "network evaluations", "distance after the last step"),
        (losses, "training steps", "held-out flow loss"),
    )
    for panel, horizontal, vertical in labels:
        panel.set(xlabel=horizontal, ylabel=vertical, title=title)
        panel.grid(alpha=0.25)
    counts.set(xscale="log", xticks=[2, 4, 10, 25], xticklabels=["2", "4", "10", "25"])
    counts.minorticks_off()
    losses.set(yscale="log")
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter("{x:.1f}")


def draw(config: PlotConfig) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in config.results.read_text().splitlines()]
    bases = {size_of(line): line["rows"] for line in reversed(lines) if line["of"]["objective"] == "none"}
    trained = trained_lines(lines)
    present = {(size_of(line), line["of"]["method"]) for line in trained}
    rows = [(size, method) for size in sorted(bases) for method in TITLES if (size, method) in present]
    figure, panels = pyplot.subplots(
        len(rows), 3, figsize=(13, 3.9 * len(rows)), squeeze=False, constrained_layout=True
    )
    for (size, method), row in zip(rows, panels, strict=True):
        draw_base(row[0], row[1], bases[size])
        for line in trained:
            if (size_of(line), line["of"]["method"]) == (size, method):
                draw_training(row, bases[size], line)
        label_axes(row, f"{size} px, {TITLES[method]}")
    legend: dict[str, Any] = {}
    for panel in panels.flat:
        legend |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    columns = len(legend) if len(legend) <= 7 else -(-len(legend) // 2)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(f"{config.title}: {NAME}, lower is better", fontsize=12)
    figure.savefig(config.output, dpi=110)


if __name__ == "__main__":
    draw(tyro.cli(PlotConfig))
