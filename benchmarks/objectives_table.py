"""The results of `benchmarks.objectives` as the tables of docs/objective.md.

    python -m benchmarks.objectives_table --results docs/results/objectives.jsonl

First quality after each number of steps and evaluations, the mean over seeds and their number; then how many samples
diff2flow takes to the final quality of the best naive training towards noise - data.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import tyro

from benchmarks.frechet import NAME
from benchmarks.objective_recipes import BATCH
from benchmarks.objectives_plot import NAMES, TITLES, trained_lines

NAIVE = ("naive", "naive_logit_normal")
Trainings = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
"""(method, objective) -> the trainings of all seeds."""


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    results: Path


def trainings(lines: Iterable[Mapping[str, Any]]) -> Trainings:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for line in trained_lines(list(lines)):
        found[line["of"]["method"], line["of"]["objective"]].append(line)
    return found


def quality(line: Mapping[str, Any], measure: str) -> dict[int, float]:
    """Steps -> distance at 10 evaluations, or the held-out flow loss."""
    return {point["step"]: point[NAME]["10"] if measure == NAME else point[measure] for point in line["curve"]}


def row(method: str, objective: str, lines: Sequence[Mapping[str, Any]]) -> str:
    curves, ends = [quality(line, NAME) for line in lines], [line["curve"][-1] for line in lines]
    cells = [f"{mean(curve[step] for curve in curves):.1f}" for step in curves[0]]
    cells += [f"{mean(end[NAME][count] for end in ends):.1f}" for count in ("2", "4", "25") if count in ends[0][NAME]]
    cells += [f"{mean(end[name] for end in ends):.3f}" for name in ("flow_loss", "known_flow_loss") if name in ends[0]]
    cells += [f"{mean(end[f'known_{NAME}'] for end in ends):.1f}"] if f"known_{NAME}" in ends[0] else []
    rates = sorted({line["rate"] for line in lines if "rate" in line})
    return " | ".join([f"| {TITLES[method]}", NAMES.get(objective, objective), str(len(lines)), *cells, f"{rates} |"])


def samples_to(curve: Mapping[int, float], goal: float) -> float | None:
    """Samples after which a quality is reached, straight between looks; None: never."""
    before = None
    for step, value in sorted(curve.items()):
        if value <= goal:
            if before is None:
                return step * BATCH
            first, share = before[0], (before[1] - goal) / (before[1] - value)
            return (first + share * (step - first)) * BATCH
        before = (step, value)
    return None


def compare(found: Trainings, method: str, measure: str, start: float | None) -> str | None:
    """How many samples diff2flow takes to the best naive training's final quality, seed by seed.

    Args:
        start: quality of the base read as a flow, which is diff2flow's after 0 steps.
    """
    ends = {name: mean(list(quality(line, measure).values())[-1] for line in found[method, name]) for name in NAIVE
            if (method, name) in found}  # fmt: skip
    if not ends or (method, "diff2flow") not in found:
        return None
    best = min(ends, key=lambda name: ends[name])
    total, parts = max(quality(found[method, best][0], measure)) * BATCH, []
    for line in found[method, "diff2flow"]:
        curve = ({0: start} if start is not None else {}) | quality(line, measure)
        samples = samples_to(curve, ends[best])
        parts.append("not reached" if samples is None else f"{samples:.0f} ({samples / total:.2f})")
    return f"| {TITLES[method]} | {measure} | {NAMES[best]}: {ends[best]:.3f} after {total} | {', '.join(parts)} |"


def main() -> None:
    lines = [json.loads(line) for line in tyro.cli(TableConfig).results.read_text().splitlines()]
    found = trainings(lines)
    for (method, objective), group in sorted(found.items(), key=lambda item: list(TITLES).index(item[0][0])):
        print(row(method, objective, group))
    rows = next((line["rows"] for line in lines if line["of"]["objective"] == "none"), [])
    start = next((each for each in rows if each["what"] == "step 0"), {})
    for method in TITLES:
        for measure, first in ((NAME, start.get(NAME, {}).get("10")), ("flow_loss", start.get("flow_loss"))):
            if told := compare(found, method, measure, first):
                print(told)


if __name__ == "__main__":
    main()
