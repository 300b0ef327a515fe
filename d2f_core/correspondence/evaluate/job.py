"""Compares matchers on pairs of images: every protocol at once, beside floors, with what a person wants to see."""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from d2f_core import storage
from d2f_core.batch.actor_pool import map_items
from d2f_core.correspondence import pck
from d2f_core.correspondence.artifact import describe_matcher
from d2f_core.correspondence.evaluate.actor import MatchScorer, groups
from d2f_core.correspondence.evaluate.answers import ALIGNED, EXACT, FLOOR, claim_output, missing, read_answers
from d2f_core.correspondence.evaluate.chunks import cut
from d2f_core.correspondence.evaluate.config import EvaluateMatchesConfig, EvaluateMatchesError
from d2f_core.correspondence.evaluate.floors import floors
from d2f_core.correspondence.evaluate.gate import FLAGS, expected_power, gate, pinned, promote
from d2f_core.correspondence.evaluate.hog import NAME as HOG
from d2f_core.correspondence.evaluate.images import images_digest, read_contents, split_usable
from d2f_core.correspondence.evaluate.matchers import describe_choice
from d2f_core.correspondence.evaluate.measure import Measured, both, measure
from d2f_core.correspondence.evaluate.pictures import Line, draw_pair
from d2f_core.correspondence.evaluate.pose_align import LABELS
from d2f_core.correspondence.evaluate.report import Shown, render_report
from d2f_core.correspondence.evaluate.scores import point_table, scores
from d2f_core.correspondence.evaluate.shared_images import share_images
from d2f_core.correspondence.evaluate.view_pairs import pairs_of_views, read_views
from d2f_core.data.quarantine import BadSample, write_quarantine
from d2f_core.data.sources.pair_sample import PairSample
from d2f_core.data.sources.pairs import read_pairs
from d2f_core.evaluation.pins import keep_pins
from d2f_core.evaluation.promotion import Promotion, check_may_promote
from d2f_core.evaluation.record import log_evaluation, write_files
from d2f_core.progress import Progress

logger = logging.getLogger(__name__)

POINTS, SCORES, REPORT = "points.parquet", "scores.json", "report.html"
NAMED = 3
"""Of the pairs that cannot be used so many are logged; all are in the ledger."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedPairs:
    """The pairs of an evaluation."""

    pairs: list[PairSample]
    ledger: list[BadSample]
    """What cannot be used."""
    images: str
    """Hash of what their images hold."""

    @property
    def left_out(self) -> int:
        return sum(entry.rows for entry in self.ledger)


def load_pairs(config: EvaluateMatchesConfig) -> LoadedPairs:
    """The pairs with a point that both images show; all their images were decoded, but none is kept.

    Raises:
        EvaluateMatchesError: there is none.
    """
    ledger: list[BadSample] = []
    if config.views.views:
        views = read_views(config.views.views, config.views.split)
        pairs = pairs_of_views(views, per_range=config.views.per_range, seed=config.views.seed)
    else:
        pairs, ledger = read_pairs(config.pairs)
    shown = [pair for pair in pairs if pair.visible.any()]
    contents = read_contents(shown)
    used, damaged = split_usable(shown, contents)
    loaded = LoadedPairs(pairs=used, ledger=[*ledger, *damaged], images=images_digest(used, contents))
    for entry in [*ledger[:NAMED], *damaged[:NAMED]]:
        logger.warning("left out: %s: %s", entry.source_uri, entry.reason)
    if not used:
        raise EvaluateMatchesError(
            f"{config.views.views or config.pairs.uri!r} has no pair with a keypoint that both images show "
            f"({loaded.left_out} cannot be used). Check the source."
        )
    return loaded


def check_trained(config: EvaluateMatchesConfig) -> None:
    """Raise MatcherError if one of `uris` holds no trained matcher; the config is as given, before `pinned`."""
    for uri in config.uris:
        describe_matcher(uri)


def check_matches(config: EvaluateMatchesConfig) -> dict[str, dict[str, Any]]:
    """What determines the answers of each matcher, by its name; no weights are loaded.

    Raises:
        ValueError: one cannot be what is asked for.
    """
    return {choice.name: describe_choice(choice) for choice in config.compared}


def evaluate_matches(config: EvaluateMatchesConfig) -> dict[str, Any]:
    """Measure all matchers, and write points, scores, the report and the ledger of what was left out; returns the
    scores. Needs a running Ray.

    Answers that are at the output already are kept.

    Raises:
        ValueError: no pair can be used, a matcher is refused, the output holds another comparison, or the cluster is
            too small.
        PinError: the gate could not promote the candidate whatever it judged; or the champion's alias moved meanwhile,
            so that the candidate was not promoted: then the files are written, and say so too.
    """
    check_trained(config)
    config, pins = pinned(config)
    if pins and config.gate.promote:
        check_may_promote(pins, config.output, alias=config.gate.champion_alias, flags=FLAGS)
    matchers = check_matches(config)
    loaded = load_pairs(config)
    pairs = loaded.pairs
    sizes = {name: getattr(config, name) for name in ("batch_size", "chunk_size", "pose_align")}
    claim_output(config.output, matchers, pairs, images=loaded.images, **sizes)
    images = [(image.key, other.key) for image, other in map(both, pairs)]
    if pins:
        keep_pins(config.output, pins)
        if expected := expected_power(config.gate, images):
            logger.info("gate: %s", expected)
    measured = measure_all(config, pairs)
    asked = {"alphas": config.alphas, "replicates": config.replicates, "seed": config.seed}
    table = [
        {"name": name, "decoding": decoding, **scores(each, **asked)} for (name, decoding), each in measured.items()
    ]
    result: dict[str, Any] = {
        "alphas": list(config.alphas), "pairs": len(pairs), "left_out": loaded.left_out,
        "labels": {ALIGNED: LABELS} if config.pose_align else {}, "rows": table,
    }  # fmt: skip
    if pins:
        result["gate"] = gate(config, pins, measured, images)
    write_quarantine(config.output, loaded.ledger)
    shown = chosen_pairs(config, pairs, measured)
    # All that may fail comes before the promotion: the alias of a candidate whose files cannot be made does not move.
    write_files(config.output, {POINTS: points_file(measured)})
    result_files(config, result, shown)
    promotion = promote(config, pins, result["gate"]) if pins else None
    write(config, result, shown, promotion)
    if promotion and promotion.error:
        raise promotion.error
    return result


def measure_all(config: EvaluateMatchesConfig, pairs: Sequence[PairSample]) -> dict[tuple[str, str], Measured]:
    """The answers of floors, then of matchers, by name and decoding."""
    measured = {(name, FLOOR): measure(guess, pairs) for name, guess in floors(config.seed).items()}
    chunked = partial(cut, chunk_size=config.chunk_size, batch_size=config.batch_size)
    size = len(groups(config.compared)), len(chunked(pairs))
    items = [{"group": group, "chunk": chunk} for group, chunk in missing(config.output, *size)]
    progress = Progress("match", size[0] * size[1], "chunks", done=size[0] * size[1] - len(items))
    if items:
        needed = {item["chunk"] for item in items}
        chunks = chunked(share_images(pairs))
        placed = [ray.put(chunk) if number in needed else None for number, chunk in enumerate(chunks)]
        arguments = (config, placed)
        for _ in map_items(items, MatchScorer, arguments, config, node_wait_seconds=config.node_wait_seconds):
            progress.advance(1)
    answers = read_answers(config.output, *size, pairs)
    names = [choice.name for choice in config.compared]
    measured[HOG, FLOOR] = answers.pop((len(names), FLOOR))
    return measured | {(names[number], decoding): each for (number, decoding), each in answers.items()}


def points_file(measured: Mapping[tuple[str, str], Measured]) -> bytes:
    points = pa.concat_tables([point_table(name, decoding, each) for (name, decoding), each in measured.items()])
    sink = io.BytesIO()
    pq.write_table(points, sink, compression="zstd")
    return sink.getvalue()


def result_files(
    config: EvaluateMatchesConfig, result: Mapping[str, Any], shown: Mapping[str, Sequence[Shown]]
) -> dict[str, bytes]:
    """Scores and report, by name."""
    source, last = config.views.views or config.pairs.uri, config.compared[-1].name
    page = render_report(result, shown, source=source, model=last)
    return {SCORES: json.dumps(result, indent=1, allow_nan=False).encode(), REPORT: page.encode()}


def write(
    config: EvaluateMatchesConfig,
    result: Mapping[str, Any],
    shown: Mapping[str, Sequence[Shown]],
    promotion: Promotion | None,
) -> None:
    """Write scores and report, and log the run.

    Raises:
        UnreachableError: what the promotion ended in, once the files are written; MLflow would be asked in vain.
    """
    files = result_files(config, result, shown)
    write_files(config.output, files)
    if promotion and promotion.error and promotion.unknown:
        raise promotion.error
    values = {
        f"{row['name']}/{row['decoding']}/pck_{each['alpha']:g}": each["value"]
        for row in result["rows"]
        for each in row["protocols"]["original"]["point"]
    }
    tags = {"d2f.pairs": config.views.views or config.pairs.uri}
    log_evaluation(
        config, name=f"evaluate {config.compared[-1].name}", tags=tags, metrics={}, counts=(), files=files,
        values={name.replace(" ", "_").replace("+", "and"): value for name, value in values.items()},
    )  # fmt: skip
    logger.info("wrote %s", storage.join(config.output, REPORT))


def chosen_pairs(
    config: EvaluateMatchesConfig, pairs: Sequence[PairSample], measured: Mapping[tuple[str, str], Measured]
) -> dict[str, list[Shown]]:
    """Drawings of pairs with the answers of the last matcher."""
    last = measured[config.compared[-1].name, EXACT]
    return shown_pairs(pairs, last, measured["box copy", FLOOR], config.shown, config.seed)


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
