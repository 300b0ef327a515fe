"""How often the matchers' gate is right: simulated evaluations in which images are easy or hard as wholes.

    python -m benchmarks.matcher_gate_calibration

Each image has an ease of its own, which both matchers share, and one for each matcher; a point is right with a
probability that grows with the ease of its pair's two images, as source and as target. Pairs are all those within
groups of images, as of a category, so that every image stands in many pairs. Of **equal** matchers neither has an
advantage; a **better** one has that for which the expected difference is what the gate calls detectable.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gate_calibration import passing_share
from d2f_core.correspondence import pck
from d2f_core.correspondence.evaluate.config import CHAMPION, MatcherGateConfig
from d2f_core.correspondence.evaluate.gate import judge
from d2f_core.correspondence.evaluate.measure import Measured
from d2f_core.evaluation.gate import Verdict

WRONG = 500.0
"""How far off a wrong point lies, in pixels of an image of 1,000."""


@dataclass(frozen=True, kw_only=True)
class MadeUp:
    """What is simulated."""

    groups: int = 10
    images: int = 6
    """Of each group; all ordered pairs of two of them are matched."""
    points: int = 8
    """Of each pair."""
    shared: float = 0.8
    """Standard deviation of an image's ease that both matchers share, in log odds."""
    own: float = 0.5
    """Of its ease for one matcher."""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        each = range(self.images)
        return [
            (group * self.images + one, group * self.images + other)
            for group in range(self.groups) for one in each for other in each if one != other
        ]  # fmt: skip


def simulate(made: MadeUp, *, advantage: float, replicates: int, seed: int) -> tuple[Verdict, float]:
    """One simulated evaluation: the verdict, and by how much more of the candidate's points are right.

    Args:
        advantage: of the candidate, in log odds.
    """
    draw = np.random.default_rng(seed)
    source, target = np.array(made.pairs).T
    shape = 2, made.groups * made.images
    shared = made.shared * draw.normal(size=shape)
    right = []
    for plus in (advantage, 0.0):
        ease = shared + made.own * draw.normal(size=shape)
        odds = plus + ease[0][source] + ease[1][target]
        right.append(draw.random((len(source), made.points)) < 1 / (1 + np.exp(-odds))[:, None])
    candidate, champion = (_measured(made, each) for each in right)
    images = [(str(one), str(other)) for one, other in made.pairs]
    config = MatcherGateConfig(candidate="a")
    verdict = judge(config, candidate, {CHAMPION: champion}, {}, images=images, replicates=replicates, seed=seed)
    return verdict, float(right[0].mean() - right[1].mean())


@lru_cache(maxsize=1)
def _template(made: MadeUp) -> Measured:
    """Answers that are all right."""
    pairs = len(made.pairs)
    points = pairs * made.points
    truth = torch.full((points, 2), 250.0, dtype=torch.float64)
    box = torch.tensor([[0.0, 0.0, 1000.0, 1000.0]], dtype=torch.float64).expand(pairs, 4)
    number = torch.arange(points)
    return Measured(
        matches=pck.Matches(
            predicted=truth, truth=truth, pair=number // made.points, size=box[:, 2:], box=box,
            category=torch.zeros(pairs, dtype=torch.int64),
        ),
        confidence=torch.ones(points), partner=torch.full((points, 2), torch.nan, dtype=torch.float64),
        keypoint=number % made.points, pair_ids=tuple(str(pair) for pair in range(pairs)), categories=("made up",),
        viewpoint=torch.full((pairs,), torch.nan), flipped=torch.zeros(pairs, dtype=torch.bool),
    )  # fmt: skip


def _measured(made: MadeUp, right: np.ndarray) -> Measured:
    template = _template(made)
    off = torch.from_numpy(np.where(right.reshape(-1, 1), 0.0, WRONG))
    return replace(template, matches=replace(template.matches, predicted=template.matches.truth + off))


def calibrate(made: MadeUp, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The share of equal and of better matchers that passes."""
    pilot = _run_many(made, options, 0.0, range(10**6, 10**6 + 60))
    wanted = float(np.mean([verdict.rules[-1].detectable or 0 for verdict, _ in pilot]))
    low, high = 0.0, 4.0
    for _ in range(8):  # the advantage whose expected difference is what is called detectable
        middle = (low + high) / 2
        gained = np.mean([gain for _, gain in _run_many(made, options, middle, range(2 * 10**6, 2 * 10**6 + 60))])
        low, high = (middle, high) if gained < wanted else (low, middle)
    rows = []
    for kind, advantage in (("equal", 0.0), ("better by one detectable difference", (low + high) / 2)):
        found = _run_many(made, options, advantage, range(options.simulations))
        share = passing_share([verdict.passed for verdict, _ in found])
        gain = float(np.mean([gained for _, gained in found]))
        rows.append({"matchers": kind, **share, "difference": gain, "detectable": wanted, "advantage": advantage})
    return rows


def _run_many(made: MadeUp, options: argparse.Namespace, advantage: float, seeds: Sequence[int]) -> list[Any]:
    one = partial(_one, made, advantage, options.replicates)
    with multiprocessing.get_context("spawn").Pool(options.processes) as workers:
        return workers.map(one, seeds, chunksize=10)


def _one(made: MadeUp, advantage: float, replicates: int, seed: int) -> tuple[Verdict, float]:
    torch.set_num_threads(1)
    return simulate(made, advantage=advantage, replicates=replicates, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", default="", help="JSON file to write")
    options = parser.parse_args()
    made, began = MadeUp(), time.monotonic()
    rows = calibrate(made, options)
    print(f"{len(made.pairs)} pairs of {made.groups * made.images} images, {made.points} points each")
    for row in rows:
        print(
            f"{row['matchers']:38} {row['evaluations']:5} evaluations  {100 * row['passed']:5.1f} % passed "
            f"({100 * row['low']:.1f} to {100 * row['high']:.1f}), {100 * row['difference']:.1f} points better"
        )
    print(f"{time.monotonic() - began:.0f} s")
    if options.results:
        about = {"simulations": options.simulations, "replicates": options.replicates, "made_up": vars(made)}
        Path(options.results).write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
