"""Compare finished depth predictions with a depth table: errors with intervals, floors, a gate, a figure and a sheet.

OUTPUT/depth_metrics.json       every value with its interval, how it was measured, and the gate's verdict
OUTPUT/depth.png                errors against network evaluations
OUTPUT/depth_sheet.png          image, truth and predictions of the first images
OUTPUT/measured/KEY/        every error of every image, in parts; a killed evaluation goes on with what is missing
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray

from d2f_core.batch.actor_pool import map_items
from d2f_core.batch.refusals import RefusedError
from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.evaluation.estimates import Metric
from d2f_core.evaluation.pins import keep_pins
from d2f_core.evaluation.promotion import Promotion
from d2f_core.evaluation.record import log_evaluation, write_files
from d2f_core.flow.depth.config import FLOORS, DepthEvaluationError, EvaluateDepthConfig
from d2f_core.flow.depth.error_parts import ErrorParts, place_of
from d2f_core.flow.depth.errors import estimate_metric, mean_depth
from d2f_core.flow.depth.figures import draw_errors, draw_maps
from d2f_core.flow.depth.gate import GatePlan, expected_power, gate, plan_gate, promote
from d2f_core.flow.depth.map_index import MapIndex, read_maps
from d2f_core.flow.depth.metrics import METRICS
from d2f_core.flow.depth.protocol import Protocol
from d2f_core.flow.depth.scorer import DepthScorer, DepthSummer
from d2f_core.flow.depth.shown import shown_maps
from d2f_core.progress import Progress
from d2f_core.storage import check_reachable
from d2f_core.tracking import check_tracking

logger = logging.getLogger(__name__)

METRICS_NAME, FIGURE_NAME, SHEET_NAME = "depth_metrics.json", "depth.png", "depth_sheet.png"
DIGEST_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class EvaluateDepthJob:
    """A checked job that is ready to run."""

    config: EvaluateDepthConfig
    truth: Manifest
    trained_on: Manifest
    models: Mapping[str, Mapping[str, Any]]
    """By title: the model's URI and hash, and its sampling settings."""
    maps: tuple[MapIndex, ...]
    protocol: Protocol
    identity: dict[str, Any]
    """What decides the errors, as JSON values."""
    gate: GatePlan | None

    @property
    def predictors(self) -> list[tuple[str, int]]:
        """Role and network evaluations of everything that is measured: floors, then predictions."""
        return measured(self.maps)

    @property
    def parts(self) -> ErrorParts:
        return ErrorParts(
            uri=place_of(self.config.output, self.identity),
            truth=self.config.truth,
            trained_on=self.config.train or self.config.truth,
            rows=self.truth.num_rows,
            trained_rows=self.trained_on.num_rows,
            rows_per_part=self.config.rows_per_part,
            resolution=self.identity["resolution"],
            protocol=self.protocol,
        )


def measured(maps: Sequence[MapIndex]) -> list[tuple[str, int]]:
    return [*((floor, 0) for floor in FLOORS), *((one.role, one.evaluations) for one in maps)]


def check_evaluate_depth(config: EvaluateDepthConfig) -> EvaluateDepthJob:
    """Read the outputs' index tables and check them.

    Raises:
        ValueError: a setting is missing, a table has another kind, the gate's rules cannot be applied, or storage is
            unusable.
    """
    for name in ("predictions", "truth", "output"):
        if not getattr(config, name):
            raise DepthEvaluationError(f"{name} is empty. Give --{name} URI.")
    check_reachable(config.output, write=True)
    if config.experiment:
        check_tracking()
    truth = _depth_table(config.truth)
    trained_on = _depth_table(config.train) if config.train else truth
    maps, models, digests = [], {}, []
    for number, uri in enumerate(config.predictions):
        manifest = read_manifest(uri)
        if manifest.fingerprint.get("task") != "image_to_depth":
            raise DepthEvaluationError(f"{uri!r} holds no depth maps. Give an output of pipelines.predict_depth.")
        model_uri, found = read_maps(uri, manifest.fingerprint, config.titles[number] if config.titles else "")
        if (title := found[0].role) in models:
            raise DepthEvaluationError(f"{uri!r} is a second output of {title!r}. Tell them apart: --titles A B.")
        models[title] = {"uri": model_uri, **manifest.fingerprint}
        digests.append(manifest.digest)
        maps += found
    protocol = Protocol.of(config, square=any(one.of_squares for one in maps))
    identity = {
        "truth": truth.digest, "mean_depth_of": trained_on.digest, "predictions": digests,
        "predictors": [list(each) for each in measured(maps)], **asdict(protocol),
        "resolution": max(one.resolution for one in maps), "rows_per_part": config.rows_per_part,
    }  # fmt: skip
    plan = plan_gate(config, place_of(config.output, identity), models, maps)
    if plan:
        logger.info("gate: %s", expected_power(config.gate, truth.num_rows))
    return EvaluateDepthJob(
        config=config, truth=truth, trained_on=trained_on, models=models, maps=tuple(maps), protocol=protocol,
        identity=identity, gate=plan,
    )  # fmt: skip


def _depth_table(uri: str) -> Manifest:
    manifest = read_manifest(uri)
    if manifest.kind != "depth":
        raise DepthEvaluationError(f"{uri!r} is a table of {manifest.kind}, not of depth. Give a depth table.")
    return manifest


def evaluate_depth(job: EvaluateDepthJob) -> dict[str, Any]:
    """Measure, judge, draw, write and log; returns the contents of the JSON file. Needs a running Ray.

    Raises:
        DepthEvaluationError: no image has both ground truth and a prediction of every model, or one has too little
            depth that counts.
        PinError: the champion's alias moved meanwhile, so that the candidate was not promoted; the files say so too.
    """
    parts = measure(job)
    complete = np.asarray(np.isfinite(parts.column("abs_rel", len(job.predictors))).all(axis=1))
    left_out = int((~complete).sum())
    if not complete.any():
        raise DepthEvaluationError(
            f"No image of {job.config.truth!r} has a map by every model ({left_out} have not). Predict the depth of "
            "this table's images first."
        )
    metrics = {name: _estimated(job, parts, name, complete) for name in METRICS}
    results = {**_results(job, metrics, int(complete.sum()), left_out), "errors": parts.errors}
    if job.gate:
        values = parts.column(job.gate.metric, len(job.predictors))
        results["gate"] = gate(job.config, job.gate, values, job.predictors)
    # All that may fail comes before the promotion: the alias of a candidate whose files cannot be made does not move.
    pictures = _pictures(job, results, metrics, np.flatnonzero(complete)[: job.config.shown])
    _to_json(results)
    promotion = promote(job.config, job.gate, parts.uri, results["gate"]) if job.gate else None
    _store(job, results, metrics, pictures, promotion)
    if promotion and promotion.error:
        raise promotion.error
    return results


def measure(job: EvaluateDepthJob) -> ErrorParts:
    """Make the missing parts of the errors, on the cluster; the driver holds no map and no row."""
    parts = job.parts
    parts.begin(job.identity)
    if job.gate:
        keep_pins(parts.uri, job.gate.pins)
    if missing := parts.missing_sums():
        _run(job.config, ("mean_depth", parts.chunks(parts.trained_rows)), DepthSummer, missing, parts)
    if not parts.has_mean:
        parts.write_mean(mean_depth(parts.read_sums()))
    if missing := parts.missing_parts():
        _run(job.config, ("depth_errors", parts.chunks(parts.rows)), DepthScorer, missing, parts, shared(job.maps))
    return parts


def shared(maps: Sequence[MapIndex]) -> Any:
    """The maps' places once on each node, and not once in each actor."""
    return ray.put(tuple(maps))


def _run(
    config: EvaluateDepthConfig, work: tuple[str, int], actor: type, chunks: Sequence[int], *arguments: Any
) -> None:
    """Do the missing chunks of a work, which is given by its name and all its chunks."""
    progress = Progress(*work, "parts", done=work[1] - len(chunks))
    try:
        for _ in _results_of(config, actor, [{"chunk": number} for number in chunks], arguments):
            progress.advance(1)
    except RefusedError as error:
        raise DepthEvaluationError(str(error)) from None


def _results_of(
    config: EvaluateDepthConfig, actor: type, items: Sequence[dict[str, int]], arguments: Sequence[Any]
) -> Iterator[Any]:
    return map_items(items, actor, arguments, config, node_wait_seconds=config.node_wait_seconds)


def _estimated(job: EvaluateDepthJob, parts: ErrorParts, name: str, complete: np.ndarray) -> Metric:
    """One metric of all predictors; metrics are read one after the other, since together they may be large."""
    columns = parts.column(name, len(job.predictors))[complete].T
    values: dict[str, dict[int, np.ndarray]] = {}
    for (role, evaluations), column in zip(job.predictors, columns, strict=True):
        values.setdefault(role, {})[evaluations] = column
    return estimate_metric(name, values, replicates=job.config.replicates)


def _results(job: EvaluateDepthJob, metrics: Mapping[str, Metric], images: int, left_out: int) -> dict[str, Any]:
    return {
        "truth": {"uri": job.config.truth, "digest": job.truth.digest},
        "images": images,
        "left_out": left_out,
        **job.protocol.to_json(),
        "intervals": f"95 %, bootstrap over images, {job.config.replicates} replicates",
        "floor_mean_of": job.config.train or job.config.truth,
        "models": dict(job.models),
        "metrics": {name: metric.to_json() for name, metric in metrics.items()},
    }


def in_words(results: Mapping[str, Any]) -> str:
    """How and on what an evaluation measured, in a line."""
    truth = results["truth"]["digest"][:DIGEST_SHOWN]
    left_out = f", {results['left_out']} left out" if results["left_out"] else ""
    return f"{results['images']} images{left_out}, truth {truth}; {results['protocol']}"


def _pictures(
    job: EvaluateDepthJob, results: Mapping[str, Any], metrics: Mapping[str, Metric], rows: np.ndarray
) -> dict[str, bytes]:
    """The figure, and the sheet of these rows of the truth, by name."""
    title = in_words(results)
    shown = shown_maps(job.config.truth, job.truth, rows, job.maps, job.protocol)
    return {FIGURE_NAME: draw_errors(metrics, title), SHEET_NAME: draw_maps(shown, title, job.protocol)}


def _to_json(results: Mapping[str, Any]) -> bytes:
    return json.dumps(results, indent=1, allow_nan=False).encode()


def _store(
    job: EvaluateDepthJob,
    results: Mapping[str, Any],
    metrics: Mapping[str, Metric],
    pictures: Mapping[str, bytes],
    promotion: Promotion | None,
) -> None:
    """Write results and pictures to the output and to a new MLflow run.

    Raises:
        UnreachableError: what the promotion ended in, once the files are written; MLflow would be asked in vain.
    """
    config, files = job.config, {METRICS_NAME: _to_json(results), **pictures}
    write_files(config.output, files)
    if promotion and promotion.error and promotion.unknown:
        raise promotion.error
    verdict = results["gate"]["verdict"] if job.gate else None
    log_evaluation(
        config,
        name=f"depth {' '.join(job.models)}",
        tags={"d2f.kind": "depth evaluation", "d2f.truth": config.truth, "d2f.protocol": results["protocol"]},
        metrics=metrics,
        counts=sorted({evaluations for _, evaluations in job.predictors}),
        files=files,
        values=verdict and {"gate_passed": float(verdict["passed"])},
    )
