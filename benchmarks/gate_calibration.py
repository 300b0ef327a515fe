"""How often the gate is right: thousands of simulated evaluations, of feature rows that an evaluation left; none drawn.

    python -m benchmarks.gate_calibration --evaluation s3://d2f/evaluations/drawings --evaluations 4
    python -m benchmarks.gate_calibration            # made-up features

Two models drew the same prompts. In a simulated evaluation of **equal** models, prompts are drawn with replacement, and
for each a coin decides which model's image is called the candidate's; so both are equal in law, with the spread that
real images have. The default gate judges by all of its rules; flow losses are made up, equal in law as well. With a
biased coin the candidate is **better**; the bias is chosen so that the expected difference is what the gate calls
detectable. A **memorising** candidate's images are those of its training, slightly moved; a **failing** one is the
better model in all, but has no image of one prompt in a hundred.
"""

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from d2f_core.evaluation.bootstrap import bootstrap_counts
from d2f_core.evaluation.config import GateConfig
from d2f_core.evaluation.estimates import Estimate, Metric
from d2f_core.evaluation.gate import Verdict, judge
from d2f_core.flow.evaluate.config import MeasureConfig
from d2f_core.flow.evaluate.image_metrics import (
    MADE_DRAWS,
    REAL_DRAWS,
    FeaturePart,
    failed_share,
    frechet_estimate,
    gather,
)
from d2f_core.flow.evaluate.memorisation import memorisation_rule, nearest_training

Array = np.ndarray
GATE = GateConfig()
LOSS, SHARED, OWN = 0.68, 0.15, 0.016
"""Of the simulated flow losses of images: mean, and standard deviations of what both models share and of what each has
by itself, as two trainings of `emoji-many` of different length have them."""
LOSS_ROWS = 128
PILOT = 60
"""Simulated evaluations that say what the gate calls detectable, before the bias is chosen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """Features of two models' images of the same prompts, of real and of training images; [n, dimensions] each."""

    first: Array
    second: Array
    real: Array
    training: Array


def made_up(prompts: int = 1000, dimensions: int = 16, noises: tuple[float, float] = (0.6, 0.9), seed: int = 0) -> Pool:
    """Gaussian features: an image is its prompt's own direction and noise, of which the second model has more."""
    draw = np.random.default_rng(seed)
    shared = draw.normal(size=(prompts, dimensions))
    first, second = (shared + noise * draw.normal(size=(prompts, dimensions)) for noise in noises)
    real, training = (np.sqrt(1.2) * draw.normal(size=(count, dimensions)) for count in (prompts, 2 * prompts))
    return Pool(first=first, second=second, real=real, training=training)


def simulate(pool: Pool, prompts: int, replicates: int, kind: str, bias: float, seed: int) -> tuple[Verdict, float]:
    """One simulated evaluation: the verdict, and the measured difference candidate - champion.

    Args:
        kind: equal, better, memorising or failing.
        bias: for "better", by how much the coin prefers the better model's image, 0 to 0.5.
    """
    draw = np.random.default_rng([seed, 7])
    chosen = draw.integers(0, len(pool.first), prompts)
    heads = draw.random((prompts, 1)) < 0.5 + (bias if kind in ("better", "failing") else 0.0)
    candidate = np.where(heads, pool.first[chosen], pool.second[chosen])
    champion = np.where(heads, pool.second[chosen], pool.first[chosen])
    if kind == "memorising":
        rows = draw.integers(0, len(pool.training), prompts)
        candidate = pool.training[rows] + 0.1 * pool.training.std(0) * draw.normal(size=candidate.shape)
    made = np.ones(prompts, bool)
    if kind == "failing":
        made[draw.permutation(prompts)[: math.ceil(prompts / 100)]] = False
    real = pool.real[draw.integers(0, len(pool.real), len(pool.real))]
    config = MeasureConfig(replicates=replicates)
    sets = [_gathered(features, config, MADE_DRAWS, made) for features in (candidate, champion)]
    reference = _gathered(real, config, REAL_DRAWS, np.ones(len(real), bool))
    estimates = [frechet_estimate(reference, each) for each in sets]
    values = dict(zip(("candidate", "champion"), ({4: each} for each in estimates), strict=True))
    metrics = {
        "frechet": Metric(name="frechet", title="", higher_is_better=False, values=values),
        "failed": Metric(
            name="failed", title="", higher_is_better=False, values={"candidate": {4: failed_share(made)}}
        ),
    }
    tested = nearest_training(candidate, pool.training, pool.real, seed=seed)
    metrics["flow_loss"] = _losses(draw, replicates)
    verdict = judge(GATE, metrics, {"candidate", "champion"}, also=[memorisation_rule(tested, GATE)])
    return verdict, estimates[0].value - estimates[1].value


def _losses(draw: np.random.Generator, replicates: int) -> Metric:
    shared = LOSS + SHARED * draw.normal(size=LOSS_ROWS)
    counts = bootstrap_counts(LOSS_ROWS, replicates, REAL_DRAWS)
    values = {}
    for role in ("candidate", "champion"):
        losses = shared + OWN * draw.normal(size=LOSS_ROWS)
        values[role] = {0: Estimate.of(float(losses.mean()), counts @ losses / LOSS_ROWS, LOSS_ROWS)}
    return Metric(name="flow_loss", title="", higher_is_better=False, values=values)


def _gathered(features: Array, config: MeasureConfig, draws: int, only: Array) -> Any:
    part = FeaturePart(np.arange(len(features)), features, None)
    return gather([part], total=len(features), dimensions=features.shape[1], config=config, draws=draws, only=only)


def calibrate(pool: Pool, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The share of each kind that passes."""
    run = partial(_run_many, pool, options)
    pilot = run("equal", 0.0, range(10**6, 10**6 + PILOT))
    wanted = float(np.mean([rule.detectable for verdict, _ in pilot for rule in verdict.rules[1:2]]))
    gap = -float(np.mean([difference for _, difference in run("better", 0.5, range(10**6, 10**6 + PILOT))]))
    bias = 0.5 * wanted / gap
    if not 0 < bias <= 0.5:
        raise SystemExit(
            f"{options.prompts} prompts see a difference of {wanted:.3g}, and these models are {gap:.3g} apart. Give "
            "more --prompts."
        )
    rows = [_row("equal", run("equal", 0.0, range(options.simulations)))]
    rows.append(_row("better by one detectable difference", run("better", bias, range(options.simulations))))
    rows += [_row(kind, run(kind, 0.5, range(options.others))) for kind in ("memorising", "failing")]
    rows[1] |= {"detectable": wanted, "difference": -rows[1]["difference"], "bias": bias}
    return rows


def _run_many(
    pool: Pool, options: argparse.Namespace, kind: str, bias: float, seeds: Sequence[int]
) -> list[tuple[Verdict, float]]:
    one = partial(simulate, pool, options.prompts, options.replicates, kind, bias)
    if options.processes == 1:
        return [one(seed) for seed in seeds]
    with multiprocessing.get_context("spawn").Pool(options.processes) as workers:
        return workers.map(one, seeds, chunksize=5)


def _row(kind: str, found: Sequence[tuple[Verdict, float]]) -> dict[str, Any]:
    difference = float(np.mean([difference for _, difference in found]))
    return {"models": kind, **passing_share([verdict.passed for verdict, _ in found]), "difference": difference}


def passing_share(passed: Sequence[bool]) -> dict[str, Any]:
    """The share of evaluations that passed, with its exact 95 % interval (Clopper and Pearson, 1934)."""
    found = binomtest(sum(passed), len(passed)).proportion_ci()
    return {
        "evaluations": len(passed), "passed": sum(passed) / len(passed), "low": float(found.low),
        "high": float(found.high),
    }  # fmt: skip


def read_pool(uri: str, evaluations: int, dimensions: int) -> Pool:
    """The features that an evaluation of a candidate and a champion (or base) stored."""
    from d2f_core.data.manifest import read_manifest
    from d2f_core.flow.evaluate.feature_table import read_features
    from d2f_core.storage import join, list_names

    tables = {name.rsplit("-", 1)[0]: join(uri, "features", name) for name in list_names(join(uri, "features"))}

    def read(role: str, steps: int) -> tuple[Array, Array]:
        parts = list(read_features(tables[role], read_manifest(tables[role]), steps, dimensions))
        return np.concatenate([part.rows for part in parts]), np.concatenate([part.features for part in parts])

    other = "champion" if "champion" in tables else "base"
    (rows, first), (others, second) = read("candidate", evaluations), read(other, evaluations)
    _, left, right = np.intersect1d(rows, others, return_indices=True)
    _, real = read("reference", 0)
    training = read("training", 0)[1] if "training" in tables else real
    return Pool(first=first[left], second=second[right], real=real, training=training)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluation", default="", help="output of pipelines.evaluate; empty: made-up features")
    parser.add_argument("--evaluations", type=int, default=4, help="number of solver steps whose images are taken")
    parser.add_argument("--dimensions", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=1000, help="of each simulated evaluation")
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--simulations", type=int, default=2000, help="of equal models, and of one better")
    parser.add_argument("--others", type=int, default=200, help="of memorising and of failing models")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", default="", help="JSON file to write")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the workers, one for each processor
    pool = read_pool(options.evaluation, options.evaluations, options.dimensions) if options.evaluation else made_up()
    began = time.monotonic()
    rows = calibrate(pool, options)
    print(f"{options.prompts} prompts, {len(pool.real)} real images, {pool.real.shape[1]} dimensions")
    for row in rows:
        print(
            f"{row['models']:38} {row['evaluations']:5} evaluations  {100 * row['passed']:5.1f} % passed "
            f"({100 * row['low']:.1f} to {100 * row['high']:.1f})"
        )
    print(f"{time.monotonic() - began:.0f} s")
    if options.results:
        about = {name: value for name, value in vars(options).items() if name not in ("processes", "results")}
        Path(options.results).write_text(json.dumps({**about, "confidence": GATE.confidence, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
