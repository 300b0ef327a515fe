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

COLOURS = {"diff2flow": "#0b6e4f", "flow_matching": "#b5651d", "diffusion": "#3b5b92"}
TITLES = {"full": "full finetuning", "small": "LoRA small", "attention": "LoRA attention"}


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    results: Path
    output: Path


def by_evaluations(values: Mapping[str, float]) -> tuple[list[int], list[float]]:
    return [int(count) for count in values], list(values.values())


def at_ten(curve: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    return [point["step"] for point in curve], [point[NAME]["10"] for point in curve]


def draw(config: PlotConfig) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in config.results.read_text().splitlines()]
    base = next(line["rows"] for line in lines if line["of"]["objective"] == "none")
    trained = [line for line in lines if line["of"]["objective"] != "none"]
    methods = [method for method in TITLES if any(line["of"]["method"] == method for line in trained)]
    ddim = [row[NAME]["10"] for row in base if row["what"].startswith("ddim")]
    start = next(row for row in base if row["what"] == "step 0")
    figure, panels = pyplot.subplots(
        len(methods), 3, figsize=(13, 3.9 * len(methods)), squeeze=False, constrained_layout=True
    )
    for method, (steps, counts, losses) in zip(methods, panels, strict=True):
        steps.axhspan(min(ddim), max(ddim), color="#bbbbbb", alpha=0.6, lw=0, label="base, DDIM (three noise sets)")
        for row, style in ((base[0], "--"), (base[1], ":"), (start, "-.")):
            counts.plot(*by_evaluations(row[NAME]), color="#555555", ls=style, label=f"base, {row['what']}")
        for line in (line for line in trained if line["of"]["method"] == method):
            objective, curve = line["of"]["objective"], line["curve"]
            style = {"color": COLOURS[objective], "marker": "o", "ms": 3.5, "label": objective}
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
            panel.set(xlabel=horizontal, ylabel=vertical, title=TITLES[method])
            panel.grid(alpha=0.25)
        counts.set(xscale="log", xticks=[2, 4, 10, 25], xticklabels=["2", "4", "10", "25"])
        counts.minorticks_off()
        losses.set(yscale="log")
    shown = [dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True)) for panel in panels[0, :2]]
    legend = shown[0] | shown[1]
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend), frameon=False)
    figure.suptitle(f"emoji-sd adapts to OpenMoji: {NAME}, lower is better", fontsize=12)
    figure.savefig(config.output, dpi=110)


if __name__ == "__main__":
    draw(tyro.cli(PlotConfig))
