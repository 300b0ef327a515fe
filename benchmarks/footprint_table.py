"""The memory table of docs/real_checkpoints.md: peak per GPU by model, method, micro-batch and ZeRO stage, 8 workers.

python -m benchmarks.footprint_table --results docs/results/footprint.json
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from d2f_core.flow.estimate.config import EstimateConfig
from d2f_core.flow.estimate.job import estimate
from pipelines.recipes_stable_diffusion import ESTIMATE

ROWS = (
    ("sd15-lora", False, (1, 4, 8)),
    ("sd15", False, (1, 4, 8)),
    ("sd15", True, (8,)),
    ("sd21-512-lora", False, (1, 4, 8)),
    ("sd21-512", False, (1, 4, 8)),
    ("sdxl-lora", True, (1, 4)),
    ("sdxl", True, (1, 4)),
)
"""Recipe, activation checkpointing, micro-batches."""


def config_of(name: str, checkpointing: bool, batch: int) -> EstimateConfig:
    known = ESTIMATE[name]
    train = replace(known.train, micro_batch_size=batch, activation_checkpointing=checkpointing)
    return replace(known, train=train)


def measure(name: str, checkpointing: bool, batch: int) -> dict[str, Any]:
    found = estimate(config_of(name, checkpointing, batch))
    row: dict[str, Any] = {"recipe": name, "checkpointing": checkpointing, "micro_batch": batch}
    row |= {"trained": found.trained, "tflop_per_sample": found.flops_per_sample / 1e12, "hours": found.train_hours}
    for stage, memory in found.memory.items():
        if not isinstance(memory, str):
            row[f"zero{stage}_gb"], row[f"host{stage}_gb"] = memory.peak / 1e9, memory.host / 1e9
            row["activations_gb"] = memory.activations / 1e9
    cells = [f"{row[f'zero{stage}_gb']:.1f}" for stage in (1, 2, 3)]
    computed_again = "again" if checkpointing else "kept"
    print(
        f"| {name} | {row['trained'] / 1e6:.1f} M | {batch} | {computed_again} | {row['activations_gb']:.1f} | "
        f"{' | '.join(cells)} | {row['host2_gb']:.1f} | {row['hours']:.1f} |",
        flush=True,
    )
    return row


def main(results: Path | None = None) -> None:
    print("| recipe | trained | micro-batch | activations | GB of them | ZeRO 1 | ZeRO 2 | ZeRO 3 | host | hours |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = [measure(name, checkpointing, batch) for name, checkpointing, batches in ROWS for batch in batches]
    if results:
        results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
