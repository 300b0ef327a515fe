"""What retrieval pairs cost beside the matrix product that they need, in seconds and in memory.

    python -m benchmarks.retrieval_pairs
    python -m benchmarks.retrieval_pairs --images 20000 --repeats 3

Both do the same products, block by block into one buffer: `product` throws them away, `pairs` finds the partners, and
setting up counts too. They take turns, and the medians are compared. Seconds of the clock are the bar on a quiet
machine; those of the processor say more where others work, though cores that wait for each other count in them.
"""

import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

from d2f_core.correspondence.pairs import CHUNK, SCORE_BYTES, nearest_partners

MEGABYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    images: int = 100_000
    width: int = 768
    """Numbers of an embedding."""
    partners: int = 10
    threads: int = 2
    """Of torch."""
    repeats: int = 1


def product(embeddings: torch.Tensor) -> None:
    """The bare matrix product in the blocks that `nearest_partners` chooses."""
    columns = -(-len(embeddings) // CHUNK) * CHUNK
    rows = min(max(1, SCORE_BYTES // (4 * columns)), len(embeddings))
    buffer = torch.empty(rows, len(embeddings))
    for start in range(0, len(embeddings), rows):
        block = embeddings[start : start + rows]
        torch.mm(block, embeddings.T, out=buffer[: len(block)])


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Of the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def peak() -> float:
    """MB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    config = tyro.cli(RetrievalConfig)
    torch.set_num_threads(config.threads)
    embeddings = torch.randn(config.images, config.width, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(config.images).numpy()
    nearest_partners(embeddings[:1000], ids[:1000])  # libraries and threads are there before the clock starts
    product(embeddings[:1000])
    before = peak()
    found, bare = [], []
    for _ in range(config.repeats):
        found.append(seconds(lambda: nearest_partners(embeddings, ids, partners=config.partners)))
        memory = peak() - before
        bare.append(seconds(lambda: product(embeddings)))
    result: dict[str, object] = {"images": config.images, "width": config.width, "threads": config.threads}
    for place, name in enumerate(("clock", "processor")):
        ours, theirs = (statistics.median(run[place] for run in runs) for runs in (found, bare))
        result[name] = {"pairs": round(ours, 2), "product": round(theirs, 2), "ratio": round(ours / theirs, 3)}
    held = embeddings.nbytes / MEGABYTE
    result["memory in MB"] = {"beside the embeddings": round(memory), "embeddings": round(held)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
