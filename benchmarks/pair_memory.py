"""Memory of evaluating one pair of photographs beside the network: 500 x 375 pixels, DINOv2-B at 434, random weights.

    python -m benchmarks.pair_memory --results docs/results/pair_memory.json

A process builds the matcher, sets the kernel's record of its largest resident memory back (/proc/self/clear_refs),
decodes, embeds and matches one pair in every way that is compared, mirrored source included, and reads the record
again. Nothing is warmed up: what libraries set aside when they are first called counts too. Linux alone.
"""

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from benchmarks.matcher_cost import build_dino
from d2f_core.correspondence.evaluate.actor import AskedMatcher
from d2f_core.correspondence.evaluate.chunks import cut
from d2f_core.correspondence.matcher import transformer_matcher
from d2f_core.correspondence.preparation import Preparation
from d2f_core.data.sources.pair_sample import PairImage, PairSample

WIDTH, HEIGHT, POINTS = 500, 375, 30
PEAK, NOW = "VmHWM", "VmRSS"


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    results: Path | None = None
    size: int = 434
    threads: int = 1


def resident(name: str) -> float:
    """MB (1e6 bytes) by the kernel's record."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def photograph(draw: np.random.Generator, name: str) -> PairImage:
    sink = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(sink, "JPEG")
    points = draw.uniform((0, 0), (WIDTH, HEIGHT), (POINTS, 2)).astype(np.float32)
    return PairImage(
        image_id=name, data=sink.getvalue(), size=(WIDTH, HEIGHT), box=(0, 0, WIDTH, HEIGHT), keypoints=points
    )


def main() -> None:
    config = tyro.cli(MemoryConfig)
    torch.set_num_threads(config.threads)
    draw = np.random.default_rng(0)
    pair = PairSample(
        source_uri="made", pair_id="pair", category="thing", source=photograph(draw, "a"), target=photograph(draw, "b"),
        visible=np.ones(POINTS, bool), flip=np.full(POINTS, -1),
    )  # fmt: skip
    (chunk,) = cut([pair], chunk_size=1, batch_size=1)
    network = build_dino().eval().requires_grad_(False)
    asked = AskedMatcher(transformer_matcher("DINOv2-B", network, Preparation(size=config.size)), pose_align=True)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident(NOW)
    answers = list(asked.answers(pair, chunk))
    weights = sum(value.nbytes for value in network.parameters()) / 1e6
    result = {
        "pixels": [WIDTH, HEIGHT], "input": config.size, "points": POINTS, "answers": len(answers),
        "weights_mb": round(weights), "process_before_mb": round(before),
        "peak_over_the_process_before_mb": round(resident(PEAK) - before),
    }  # fmt: skip
    print(text := json.dumps(result, indent=1))
    if config.results:
        config.results.write_text(text + "\n")


if __name__ == "__main__":
    main()
