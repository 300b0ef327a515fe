"""What a worker needs under each ZeRO stage, side by side."""

import dataclasses
from collections.abc import Mapping, Sequence

from d2f_core.train.config import TrainConfig
from d2f_core.train.gpus import GPUS
from d2f_core.train.memory import Memory, memory_per_worker

ByStage = Mapping[int, Memory | str]
"""Memory by ZeRO stage, or the reason why the stage is refused."""


def memory_by_stage(train: TrainConfig, trained: Sequence[int], frozen: Sequence[int], **more: int) -> ByStage:
    """The memory of a worker under each stage; the arguments are those of `memory_per_worker`."""
    found: dict[int, Memory | str] = {}
    for stage in (0, 1, 2, 3):
        try:
            config = dataclasses.replace(train, zero_stage=stage)
        except ValueError as refused:
            found[stage] = str(refused)
            continue
        found[stage] = memory_per_worker(config, trained, frozen, **more)
    return found


def memory_table(found: ByStage, *, chosen: int, gpu: str) -> list[str]:
    """The lines of a table in Markdown; 1 GB is 1e9 bytes.

    Args:
        chosen: the stage that the training uses.
        gpu: a name in `GPUS`.
    """
    lines = [
        "| ZeRO | weights | copies, moments | averages | gradients, bucket | activations | text, CUDA | peak GB | "
        f"{gpu} | host GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage, memory in found.items():
        name = f"**{stage}**" if stage == chosen else str(stage)
        if isinstance(memory, str):
            lines.append(f"| {name} | refused: {memory} | | | | | | | | |")
            continue
        parts = (
            memory.weights, memory.master + memory.moments, memory.averages, memory.gradients + memory.bucket,
            memory.activations, memory.others, memory.peak,
        )  # fmt: skip
        fits = "fits" if memory.peak <= 0.95 * GPUS[gpu].memory else "too large"
        cells = " | ".join(f"{part / 1e9:.1f}" for part in parts)
        lines.append(f"| {name} | {cells} | {fits} | {memory.host / 1e9:.1f} |")
    return lines
