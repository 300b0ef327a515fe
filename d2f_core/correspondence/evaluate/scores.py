"""From predicted points to a table of scores: every protocol, alpha and way of averaging, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from d2f_core.correspondence import pck
from d2f_core.correspondence.evaluate.measure import Measured, by_viewpoint
from d2f_core.evaluation.bootstrap import bootstrap_counts
from d2f_core.evaluation.estimates import Estimate

AVERAGES = ("point", "image", "category")
SIDES_ALPHA = 0.1


def scores(measured: Measured, alphas: Sequence[float], *, replicates: int, seed: int) -> dict[str, Any]:
    """Scores by protocol: {protocol: {average: [{alpha, value, low, high}, ...]}}, beside `by_viewpoint`,
    `viewpoint_pairs`, `by_category`, `categories`, `sides` and `curve` of the protocol `original`; `flipped` counts
    pairs."""
    pairs = len(measured.pair_ids)
    draws = torch.from_numpy(bootstrap_counts(pairs, replicates, seed))
    found: dict[str, Any] = {"pairs": pairs, "points": len(measured.matches.pair), "protocols": {}}
    every: dict[str, tuple[pck.Pck, pck.Pck]] = {}
    found["flipped"] = int(measured.flipped.sum())
    for name, protocol in pck.PROTOCOLS.items():
        once = pck.pck(measured.matches, protocol.scoring, alphas)
        drawn = pck.pck(measured.matches, protocol.scoring, alphas, draws=draws)
        every[name] = once, drawn
        found["protocols"][name] = {
            average: [
                _estimate(alpha, once.average(average)[0, column], drawn.average(average)[:, column], pairs)
                for column, alpha in enumerate(alphas)
            ]
            for average in AVERAGES
        }
    once, drawn = every["original"]
    found["by_category"] = dict(zip(measured.categories, once.by_category[0, :, 0].tolist(), strict=True))
    found["categories"] = _by_category(measured, once, drawn)
    found["by_viewpoint"] = _by_viewpoint(measured, alphas)
    found["viewpoint_pairs"] = {name: int(within.sum()) for name, within in by_viewpoint(measured)}
    found["sides"] = _sides(measured)
    found["curve"] = curve(measured)
    return found


def _estimate(alpha: float, value: Tensor, drawn: Tensor, pairs: int) -> dict[str, float]:
    estimate = Estimate.of(float(value), drawn[~drawn.isnan()].numpy(), pairs)
    return {"alpha": alpha, "value": estimate.value, "low": estimate.low, "high": estimate.high}


def _by_category(measured: Measured, once: pck.Pck, drawn: pck.Pck) -> dict[str, dict[str, Any]]:
    """Of each category its pairs, its points, and its PCK at each alpha."""
    category = measured.matches.category
    pairs = category.bincount(minlength=len(measured.categories)).tolist()
    points = category[measured.matches.pair].bincount(minlength=len(measured.categories)).tolist()
    return {
        name: {
            "pairs": pairs[place],
            "points": points[place],
            "pck": [
                _estimate(alpha, once.by_category[0, place, column], drawn.by_category[:, place, column], pairs[place])
                for column, alpha in enumerate(once.alphas)
            ],
        }
        for place, name in enumerate(measured.categories)
    }


def _by_viewpoint(measured: Measured, alphas: Sequence[float]) -> dict[str, float]:
    """PCK by point at the first alpha, for ranges of the angle between the views that hold a pair."""
    ranges = [(name, within) for name, within in by_viewpoint(measured) if bool(within.any())]
    if not ranges:
        return {}
    draws = torch.stack([within for _, within in ranges])
    values = pck.pck(measured.matches, pck.PROTOCOLS["original"].scoring, alphas[:1], draws=draws).point[:, 0]
    return dict(zip([name for name, _ in ranges], values.tolist(), strict=True))


def _sides(measured: Measured) -> dict[str, float]:
    """Of the points that have a flip partner in the target, how many were taken for it."""
    asked = ~measured.partner.isnan().any(dim=1)
    scoring = pck.PROTOCOLS["original"].scoring
    taken = pck.side_confusion(measured.matches, measured.partner, scoring, SIDES_ALPHA)
    return {"points": int(asked.sum()), "confused": int((taken & asked).sum())}


def curve(
    measured: Measured, alphas: Sequence[float] = tuple(np.linspace(0.01, 0.2, 20).round(3))
) -> list[list[float]]:
    """[alpha, PCK by point], rising."""
    scoring = pck.PROTOCOLS["original"].scoring
    values = pck.pck(measured.matches, scoring, tuple(alphas)).point[0]
    return [[float(alpha), value] for alpha, value in zip(alphas, values.tolist(), strict=True)]


def point_table(name: str, decoding: str, measured: Measured) -> pa.Table:
    """One row per point: what was predicted, and what is true."""
    matches, pair = measured.matches, measured.matches.pair
    error = pck.errors(matches, pck.PROTOCOLS["original"].scoring)
    columns: Mapping[str, Any] = {
        "matcher": [name] * len(pair),
        "decoding": [decoding] * len(pair),
        "pair_id": [measured.pair_ids[number] for number in pair.tolist()],
        "category": [measured.categories[number] for number in matches.category[pair].tolist()],
        "keypoint": measured.keypoint.tolist(),
        "predicted": matches.predicted.tolist(),
        "truth": matches.truth.tolist(),
        "error": error.tolist(),
        "confidence": measured.confidence.tolist(),
        "viewpoint": measured.viewpoint[pair].tolist(),
    }
    return pa.table(dict(columns))
