"""Compares matchers on pairs of images: every protocol at once, beside floors, with what a person wants to see."""

import io
import json
import logging
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from d2f_core import storage
from d2f_core.batch.actor_pool import map_items
from d2f_core.correspondence import pck
from d2f_core.correspondence.evaluate.config import CHAMPION, EvaluateMatchesConfig, EvaluateMatchesError
from d2f_core.correspondence.evaluate.gate import judge, pinned
from d2f_core.correspondence.evaluate.matchers import build_matcher
from d2f_core.correspondence.evaluate.measure import Measured, both, floors, measure, predict_by
from d2f_core.correspondence.evaluate.pictures import Line, draw_pair
from d2f_core.correspondence.evaluate.report import Shown, render_report
from d2f_core.correspondence.evaluate.scores import point_table, scores
from d2f_core.correspondence.evaluate.view_pairs import pairs_of_views, read_views
from d2f_core.correspondence.matching import PUBLISHED
from d2f_core.data.sources.pair_sample import PairSample
from d2f_core.data.sources.pairs import read_pairs
from d2f_core.device import reserved_device
from d2f_core.evaluation.pins import Pins, keep_pins, promote_candidate, registered_name
from d2f_core.evaluation.record import log_evaluation, write_files

logger = logging.getLogger(__name__)

EXACT, AS_PUBLISHED, FLOOR = "exact", "published", "floor"
POINTS, SCORES, REPORT = "points.parquet", "scores.json", "report.html"


def load_pairs(config: EvaluateMatchesConfig) -> tuple[list[PairSample], int]:
    """The pairs, and how many of the source cannot be used.

    Raises:
        EvaluateMatchesError: there is none.
    """
    if config.views.views:
        views = read_views(config.views.views, config.views.split)
        pairs, bad = pairs_of_views(views, per_range=config.views.per_range, seed=config.views.seed), 0
    else:
        pairs, ledger = read_pairs(config.pairs)
        bad = sum(entry.rows for entry in ledger)
        for entry in ledger[:3]:
            logger.warning("left out: %s: %s", entry.source_uri, entry.reason)
    used = [pair for pair in pairs if pair.visible.any()]
    if not used:
        raise EvaluateMatchesError(
            f"{config.views.views or config.pairs.uri!r} has no pair with a keypoint that both images show ({bad} "
            "cannot be used). Check the source."
        )
    return used, bad


class MatchScorer:
    """Ray Data actor: the number of a matcher -> its points on all pairs, exactly decoded and as published."""

    def __init__(self, config: EvaluateMatchesConfig) -> None:
        torch.set_num_threads(config.cpus_per_actor)
        self._config, self._device = config, reserved_device()
        self._pairs = load_pairs(config)[0]

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        number = int(batch["number"][0])
        matcher = build_matcher(self._config.matchers[number], self._device)
        kept: Any = OrderedDict()
        found = {}
        for name, decoding in ((EXACT, matcher.decoding), (AS_PUBLISHED, PUBLISHED)):
            found[name] = measure(predict_by(replace(matcher, decoding=decoding), kept), self._pairs)
        return {"number": [number], "measured": [pickle.dumps(found)]}


def evaluate_matches(config: EvaluateMatchesConfig) -> dict[str, Any]:
    """Measure all matchers, and write points, scores and the report; returns the scores. Needs a running Ray.

    Raises:
        ValueError: no pair can be used, a matcher is refused, or the cluster is too small.
    """
    config, pins = pinned(config)
    pairs, bad = load_pairs(config)
    if pins:
        keep_pins(config.output, pins)
    measured: dict[tuple[str, str], Measured] = {}
    for name, guess in floors(config.seed).items():
        measured[name, FLOOR] = measure(guess, pairs)
    items = [{"number": number} for number in range(len(config.matchers))]
    rows = map_items(items, MatchScorer, (config,), config, node_wait_seconds=config.node_wait_seconds)
    results = {int(row["number"]): pickle.loads(row["measured"]) for row in rows}  # pickled by this job's actors
    for number, matcher in enumerate(config.matchers):
        for decoding in (EXACT, AS_PUBLISHED):
            measured[matcher.name, decoding] = results[number][decoding]
        logger.info("%s: measured on %d pairs", matcher.name, len(pairs))
    table = [
        {
            "name": name,
            "decoding": decoding,
            **scores(each, config.alphas, replicates=config.replicates, seed=config.seed),
        }
        for (name, decoding), each in measured.items()
    ]
    result = {"alphas": list(config.alphas), "pairs": len(pairs), "left_out": bad, "rows": table}
    if pins:
        result["gate"] = gate(config, pins, measured)
    write(config, result, pairs, measured)
    if pins and result["gate"]["promotion"]:
        promote_candidate(pins, champion=config.gate.champion, champion_alias=config.gate.champion_alias)
    return result


def gate(config: EvaluateMatchesConfig, pins: Pins, measured: Mapping[tuple[str, str], Measured]) -> dict[str, Any]:
    """The gate's verdict on the candidate, and which alias it moves."""
    rules = config.gate
    names = [*([CHAMPION] if (CHAMPION, EXACT) in measured else []), *rules.must_beat]
    verdict = judge(
        rules,
        measured[rules.candidate, EXACT],
        {name: measured[name, EXACT] for name in names},
        {name: each for (name, decoding), each in measured.items() if decoding == FLOOR},
        replicates=config.replicates,
        seed=config.seed,
    )
    if pins.champion == pins.candidate:
        verdict = replace(verdict, passed=False, reason="the candidate is the champion already")
    moves = verdict.passed and rules.promote and bool(registered_name(pins.candidate))
    logger.info("gate: %s: %s", "passed" if verdict.passed else "not passed", verdict.reason)
    return {
        "candidate": pins.candidate,
        "champion": pins.champion,
        "verdict": verdict.to_json(),
        "promotion": f"{pins.candidate} becomes @{rules.champion_alias}" if moves else None,
    }


def write(
    config: EvaluateMatchesConfig,
    result: Mapping[str, Any],
    pairs: Sequence[PairSample],
    measured: Mapping[tuple[str, str], Measured],
) -> None:
    """Write the files, and log the run."""
    points = pa.concat_tables([point_table(name, decoding, each) for (name, decoding), each in measured.items()])
    sink = io.BytesIO()
    pq.write_table(points, sink, compression="zstd")
    last = config.matchers[-1].name
    shown = shown_pairs(pairs, measured[last, EXACT], measured["box copy", FLOOR], config.shown, config.seed)
    page = render_report(result, shown, source=config.views.views or config.pairs.uri, model=last)
    files = {SCORES: json.dumps(result, indent=1).encode(), REPORT: page.encode()}
    write_files(config.output, {POINTS: sink.getvalue(), **files})
    values = {
        f"{row['name']}/{row['decoding']}/pck_{each['alpha']:g}": each["value"]
        for row in result["rows"]
        for each in row["protocols"]["original"]["point"]
    }
    tags = {"d2f.pairs": config.views.views or config.pairs.uri}
    log_evaluation(
        config, name=f"evaluate {last}", tags=tags, metrics={}, counts=(), files=files,
        values={name.replace(" ", "_").replace("+", "and"): value for name, value in values.items()},
    )  # fmt: skip
    logger.info("wrote %s", storage.join(config.output, REPORT))


def shown_pairs(
    pairs: Sequence[PairSample], model: Measured, floor: Measured, count: int, seed: int
) -> dict[str, list[Shown]]:
    """Drawings of some pairs, chosen by `seed`, and of those on which the matcher is worst."""
    error = pck.errors(model.matches, pck.PROTOCOLS["original"].scoring)
    right = error <= 0.1
    rows = {number: np.flatnonzero(model.matches.pair.numpy() == number) for number in range(len(pairs))}
    share = np.array([float(right[rows[number]].double().mean()) for number in range(len(pairs))])
    drawn = np.random.default_rng(seed).permutation(len(pairs))[:count].tolist()
    mean = np.array([float(error[rows[number]].mean()) for number in range(len(pairs))])
    worst = np.lexsort((np.arange(len(pairs)), -mean, share))
    found: dict[str, list[Shown]] = {}
    for title, chosen in (("Some pairs", drawn), ("The worst pairs", worst[:count].tolist())):
        found[title] = []
        for number in chosen:
            lines = [
                Line(
                    source=both(pairs[number])[0].keypoints[model.keypoint[row]],
                    predicted=model.matches.predicted[row].numpy(),
                    truth=model.matches.truth[row].numpy(),
                    guess=floor.matches.predicted[row].numpy(),
                    right=bool(right[row]),
                )
                for row in rows[number]
            ]
            angle = pairs[number].viewpoint
            text = f"{pairs[number].category}, {int(right[rows[number]].sum())} of {len(lines)} within 0.1"
            text += "" if angle is None else f", {angle:.0f}° apart"
            found[title].append(Shown(picture=draw_pair(pairs[number], lines), text=text))
    return found
