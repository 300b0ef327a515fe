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
from benchmarks.objectives import Config

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


def draw(config: PlotConfig) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in config.results.read_text().splitlines()]
    bases = {size_of(line): line["rows"] for line in reversed(lines) if line["of"]["objective"] == "none"}
    trained = [line for line in lines if line["of"]["objective"] != "none" and not set(TUNING) & set(line["of"])]
    present = {(size_of(line), line["of"]["method"]) for line in trained}
    rows = [(size, method) for size in sorted(bases) for method in TITLES if (size, method) in present]
    figure, panels = pyplot.subplots(
        len(rows), 3, figsize=(13, 3.9 * len(rows)), squeeze=False, constrained_layout=True
    )
    for (size, method), (steps, counts, losses) in zip(rows, panels, strict=True):
        base = bases[size]
        ddim = [row[NAME]["10"] for row in base if row["what"].startswith("ddim")]
        start = next(row for row in base if row["what"] == "step 0")
        steps.axhspan(min(ddim), max(ddim), color="#bbbbbb", alpha=0.6, lw=0, label="base, DDIM (three noise sets)")
        steps.axhline(base[1][NAME]["10"], color="#555555", ls=":")
        for row, style in ((base[0], "--"), (base[1], ":"), (start, "-.")):
            counts.plot(*by_evaluations(row[NAME]), color="#555555", ls=style, label=f"base, {row['what']}")
        for line in (line for line in trained if (size_of(line), line["of"]["method"]) == (size, method)):
            objective, shift, curve = line["of"]["objective"], line["of"].get("shift", 1), line["curve"]
            label = objective if shift == 1 else f"{objective}, shifted times"
            style = {"color": COLOURS[objective], "marker": "o", "ms": 3.5, "label": label}
            style["ls"] = "-" if shift == 1 else "--"
            x, y = at_ten(curve)
            first = start[NAME]["10"] if objective == "diff2flow" else None
            steps.plot([0, *x] if first else x, [first, *y] if first else y, **style)
            counts.plot(*by_evaluations(curve[-1][NAME]), **style)
            losses.plot(
                [0, *x] if first else x, [start["flow_loss"]] * bool(first) + [p["flow_loss"] for p in curve], **style
            )
        labels = (
            (steps, "training steps", "distance at 10 network evaluations"),
            (counts, "network evaluations", "distance after the last step"),
            (losses, "training steps", "held-out flow loss"),
        )
        for panel, horizontal, vertical in labels:
            panel.set(xlabel=horizontal, ylabel=vertical, title=f"{size} px, {TITLES[method]}")
            panel.grid(alpha=0.25)
        counts.set(xscale="log", xticks=[2, 4, 10, 25], xticklabels=["2", "4", "10", "25"])
        counts.minorticks_off()
        losses.set(yscale="log")
        losses.yaxis.set_major_formatter("{x:g}")
        losses.yaxis.set_minor_formatter("{x:.1f}")
    legend: dict[str, Any] = {}
    for panel in panels.flat:
        legend |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    columns = len(legend) if len(legend) <= 7 else -(-len(legend) // 2)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(f"{config.title}: {NAME}, lower is better", fontsize=12)
    figure.savefig(config.output, dpi=110)


if __name__ == "__main__":
    draw(tyro.cli(PlotConfig))
