"""Rounds of reflow of a base model, by LoRA and in full, as one figure and one JSON.

    python -m benchmarks.reflow_plot --lora s3://d2f/workflows/reflow-lora --full s3://d2f/workflows/reflow-full \
        --results docs/results/reflow_base.json --figure docs/reflow_base.png

It reads the evaluations that `pipelines.workflow reflow` left; docs/reflow.md has the commands that make them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from d2f_core.storage import exists, join, read_bytes

BASE_NAMES = {"ddim": "base, DDIM", "dpm++": "base, DPM-Solver++", "euler": "base as a flow model, Euler"}
COLOURS = {"base": "#555555", "LoRA": "#0b6e4f", "full": "#b5651d"}
STYLES = {"DDIM": "-", "DPM-Solver++": ":", "Euler": "--", "round 1": "-", "round 2": "--"}
METRIC = "frechet"


@dataclass(frozen=True, kw_only=True)
class Config:
    lora: str
    """Output of `pipelines.workflow reflow` with a LoRA."""
    full: str
    """The same in full."""
    results: Path
    figure: Path
    title: str = "reflow of emoji-sd on its own drawings"


def read_evaluation(uri: str) -> dict[str, Any]:
    return json.loads(read_bytes(join(uri, "metrics.json")))


def curve(evaluation: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation says of one of its models."""
    kept = ("uri", "sha256", "solver", "guidance", "straightness", "validation_flow_loss")
    values = {name: metric["values"][model["role"]] for name, metric in evaluation["metrics"].items()}
    return {**{name: model[name] for name in kept}, "metrics": values}


def collect(config: Config) -> dict[str, dict[str, Any]]:
    """Curves by what the figure calls them.

    Raises:
        ValueError: a method without evaluation, or evaluations of different prompts or reference images.
    """
    outputs = {"LoRA": config.lora, "full": config.full}
    read = {
        (method, number): read_evaluation(place)
        for method, output in outputs.items()
        for number in (1, 2)
        if exists(join(place := join(output, f"round-{number}", "evaluation"), "metrics.json"))
    }
    if len({method for method, _ in read}) < len(outputs):
        raise ValueError(f"{list(outputs.values())} hold evaluations of {sorted(read)} alone. Let the workflows end.")
    judged = {json.dumps([one["prompts"], one["reference"], one["features"]]) for one in read.values()}
    if len(judged) > 1:
        raise ValueError(f"evaluations of different prompts, images or features: {sorted(judged)}. Compare like ones.")
    bases, rounds = {}, {}
    for (method, number), evaluation in read.items():
        for model in evaluation["models"]:
            if model["role"] == "base":
                bases.setdefault(BASE_NAMES[model["solver"]], curve(evaluation, model))
            elif model["role"] == "candidate":
                rounds[f"{method}, round {number}"] = curve(evaluation, model)
    bases = {name: bases[name] for name in BASE_NAMES.values() if name in bases}
    floor = next(iter(read.values()))["metrics"][METRIC]["floor"]
    return {**bases, **rounds, "two halves of the real images": {"metrics": {METRIC: floor}}}


def draw(config: Config, curves: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    floor = curves["two halves of the real images"]["metrics"][METRIC]
    models = {name: curve for name, curve in curves.items() if "solver" in curve}
    figure, (quality, straightness) = pyplot.subplots(
        1, 2, figsize=(12, 5), width_ratios=(3, 2), constrained_layout=True
    )
    for name, model in models.items():
        values = model["metrics"][METRIC]
        counts = [int(count) for count in values]
        look = {
            "color": next(colour for word, colour in COLOURS.items() if name.startswith(word)),
            "ls": next(style for word, style in STYLES.items() if word in name),
        }
        quality.plot(counts, [one["value"] for one in values.values()], marker="o", ms=4, label=name, **look)
        quality.fill_between(
            counts, *([one[end] for one in values.values()] for end in ("low", "high")), color=look["color"], alpha=0.08
        )
    quality.axhline(floor["value"], color="#bbbbbb", lw=1, label="two halves of the real images")
    quality.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="Frechet distance, lower is better")
    quality.set(xticks=counts, xticklabels=[str(count) for count in counts])
    quality.yaxis.set_major_formatter("{x:.0f}")
    quality.yaxis.set_minor_formatter("{x:.0f}")
    quality.xaxis.minorticks_off()
    quality.grid(alpha=0.25, which="both")
    # A path does not depend on how the base is sampled: one bar for it.
    bars = {name: model for name, model in models.items() if not name.startswith("base")}
    bars = {"base": next(iter(models.values())), **bars}
    places = range(len(bars))
    straightness.barh(
        places,
        [model["straightness"]["value"] for model in bars.values()],
        xerr=[
            [model["straightness"]["value"] - model["straightness"]["low"] for model in bars.values()],
            [model["straightness"]["high"] - model["straightness"]["value"] for model in bars.values()],
        ],
        color=[next(colour for word, colour in COLOURS.items() if name.startswith(word)) for name in bars],
    )
    straightness.set(yticks=places, yticklabels=list(bars), xlabel="bend of the paths, 0 is straight")
    straightness.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{config.title} (bands: 95 %)", fontsize=12)
    config.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.figure, dpi=110)


def main() -> None:
    config = tyro.cli(Config)
    curves = collect(config)
    config.results.parent.mkdir(parents=True, exist_ok=True)
    config.results.write_text(json.dumps(curves, indent=1) + "\n")
    draw(config, curves)


if __name__ == "__main__":
    main()
