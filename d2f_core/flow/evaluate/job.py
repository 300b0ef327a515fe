"""Evaluate a candidate against champion and base: images from the same prompts and noise are scored, reported and
judged.

    OUTPUT/models.json        which versions are compared
    OUTPUT/generations/ROLE   images and index of each model, at every number of network evaluations
    OUTPUT/features/NAME-KEY  features of these and of the real images
    OUTPUT/metrics.json       every value with its interval, and the gate's verdict
    OUTPUT/report.html        the same to look at

Every step is resumable: a second run continues where a killed one stopped. The champion's alias moves when all is
measured, before metrics and report are written: they say what came of it.
"""

import datetime
import json
import logging
from dataclasses import asdict, replace
from typing import Any

from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.evaluation.config import FLOW_LOSS
from d2f_core.evaluation.estimates import Estimate, Metric
from d2f_core.evaluation.gate import Verdict, check_gate, judge
from d2f_core.evaluation.pins import PINS_NAME, REGISTERED, keep_pins, pin_models, registered_name
from d2f_core.evaluation.promotion import Promotion, check_may_promote, promote_candidate
from d2f_core.evaluation.record import log_evaluation, write_files
from d2f_core.flow.evaluate.compared_models import (
    VALIDATION_LOSS,
    ComparedModel,
    EvaluateJob,
    carried_sampling,
    make_compared_model,
    validation_loss,
)
from d2f_core.flow.evaluate.config import EvaluateConfig, EvaluateError
from d2f_core.flow.evaluate.feature_networks import CaptionScorer, load_features
from d2f_core.flow.evaluate.metrics import measure_all, measured_names
from d2f_core.flow.evaluate.report import render_report, shown_images
from d2f_core.flow.evaluate.straightness import follow_all
from d2f_core.flow.generate.job import generate_all
from d2f_core.storage import check_reachable
from d2f_core.tracking import check_tracking

logger = logging.getLogger(__name__)

METRICS_NAME, REPORT_NAME = "metrics.json", "report.html"


def check_evaluate(config: EvaluateConfig) -> EvaluateJob:
    """Check everything that can be checked before a cluster is used.

    Raises:
        ValueError: unusable storage, models, prompts, features or gate; one line each.
    """
    config.check_complete()
    check_reachable(config.output, write=True)
    for uri in (config.candidate, config.champion, config.base):
        check_reachable(uri)
    if config.experiment or config.candidate.startswith(REGISTERED):
        check_tracking()
    per_model_names = {FLOW_LOSS} | ({"straightness"} if config.straightness_prompts else set())
    check_gate(config.gate, measured_names(config) | per_model_names, config.evaluations)
    reference = read_reference(config)
    features = load_features(config.score.features, dimensions=config.score.dimensions, device="meta")
    clip = CaptionScorer(config.score.clip, "meta").model.files.hash() if config.score.clip else ""
    pins = pin_models(
        config.output,
        candidate=config.candidate,
        champion=config.champion,
        champion_alias=config.champion_alias,
        base=config.base,
    )
    if config.promote:
        check_may_promote(pins, config.output, alias=config.champion_alias)
    wanted = pins.models
    if pins.champion == pins.candidate:
        del wanted["champion"]
    # Images of different sizes cannot be compared: all models generate the candidate's size.
    edge = config.resolution or carried_sampling(pins.candidate).get("resolution")
    return EvaluateJob(
        config=config,
        pins=pins,
        compared=tuple(make_compared_model(config, role, uri, edge) for role, uri in wanted.items()),
        feature_name=features.name,
        dimensions=features.dimensions,
        fingerprint={"features": features.name, "network": features.network.fingerprint, "clip": clip},
        reference=reference,
    )


def read_reference(config: EvaluateConfig) -> Manifest:
    """The manifest of the real images.

    Raises:
        ValueError: the reference is not reachable, is no table of images, or has too few images.
    """
    check_reachable(config.reference)
    reference = read_manifest(config.reference)
    if reference.kind not in ("images", "generations"):
        raise EvaluateError(f"reference={config.reference!r} is a table of {reference.kind}. Give real images.")
    if reference.num_rows < 4 * (config.measure.neighbours + 1):
        raise EvaluateError(f"reference={config.reference!r} has {reference.num_rows} images. Give more.")
    return reference


def evaluate(job: EvaluateJob) -> Verdict:
    """Generate, score, judge; move the champion's alias when the gate passes; report. Needs a running Ray.

    Raises:
        ValueError: the output belongs to another evaluation, a cluster or server cannot be used, or a candidate that
            passed was not promoted; then metrics and report are written, and say why.
    """
    config = job.config
    keep_pins(config.output, job.pins)
    for compared in job.compared:
        logger.info("the %s is %s", compared.role, compared.uri)
    generate_all([compared.job for compared in job.compared])
    metrics, distances = measure_all(job)
    paths = follow_all(job)
    losses = {each.role: loss for each in job.compared if (loss := validation_loss(each.uri)) is not None}
    verdict = judge(config.gate, metrics | per_model(paths, losses), {compared.role for compared in job.compared})
    if job.pins.champion == job.pins.candidate:
        verdict = replace(verdict, passed=False, reason="the candidate is the champion already")
    logger.info("gate: %s: %s", "passed" if verdict.passed else "not passed", verdict.reason)
    promotion = None
    if verdict.passed and config.promote and registered_name(job.pins.candidate):
        promotion = promote_candidate(job.pins, config.output, alias=config.champion_alias)
    _store(job, _results(job, metrics, distances, paths, losses, verdict), metrics, promotion)
    if promotion and promotion.error:
        raise promotion.error
    return verdict


def per_model(paths: dict[str, Estimate], losses: dict[str, float]) -> dict[str, Metric]:
    """Metrics for the gate that do not depend on the number of evaluations."""
    measured = {
        "straightness": paths,
        FLOW_LOSS: {role: Estimate(value=loss, low=loss, high=loss, count=0) for role, loss in losses.items()},
    }
    return {
        name: Metric(
            name=name,
            title=name.replace("_", " "),
            higher_is_better=False,
            values={role: {0: each} for role, each in values.items()},
        )
        for name, values in measured.items()
    }


def _results(
    job: EvaluateJob,
    metrics: dict[str, Metric],
    distances: dict[str, dict[int, Estimate]],
    paths: dict[str, Estimate],
    losses: dict[str, float],
    verdict: Verdict,
) -> dict[str, Any]:
    """The contents of metrics.json, but for the promotion."""
    config = job.config
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "models": [_model(compared, paths, losses) for compared in job.compared],
        "features": {**job.fingerprint, "uri": config.score.features},
        "prompts": {"uri": config.prompts, "count": job.compared[0].job.prompts.num_rows, "seed": config.seed},
        "reference": {"uri": config.reference, "count": job.reference.num_rows},
        "evaluations": sorted(config.evaluations),
        "intervals": f"95 %, bootstrap over images, {config.measure.replicates} replicates",
        "metrics": {short: metric.to_json() for short, metric in metrics.items()},
        "distance_to_candidate": {
            "name": f"distance_{job.feature_name}",
            "values": {
                role: {str(count): each.to_json() for count, each in values.items()}
                for role, values in distances.items()
            },
        },
        "gate": {**asdict(config.gate), "verdict": verdict.to_json()},
    }


def _model(compared: ComparedModel, paths: dict[str, Estimate], losses: dict[str, float]) -> dict[str, Any]:
    plan, path = compared.job.plan, paths.get(compared.role)
    return {
        "role": compared.role,
        "uri": compared.uri,
        "sha256": plan.model_hash,
        "solver": plan.solver,
        "guidance": plan.guidance,
        "shift": plan.shift,
        "size": [plan.height, plan.width],
        "straightness": path and path.to_json(),
        VALIDATION_LOSS: losses.get(compared.role),
    }


def _store(job: EvaluateJob, results: dict[str, Any], metrics: dict[str, Metric], promotion: Promotion | None) -> None:
    """Write results and report to the output and to a new MLflow run.

    Raises:
        UnreachableError: what the promotion ended in, once the files are written; MLflow would be asked in vain.
    """
    config = job.config
    results = {**results, "promotion": promotion and promotion.text}
    shown = shown_images({each.role: each.images for each in job.compared}, config.shown_prompts)
    files = {
        METRICS_NAME: json.dumps(results, indent=1, allow_nan=False).encode(),
        REPORT_NAME: render_report(results, shown).encode(),
    }
    write_files(config.output, files)
    if promotion and promotion.error and promotion.unknown:
        raise promotion.error
    log_evaluation(
        config,
        name=f"evaluate {job.pins.candidate.removeprefix(REGISTERED)}",
        tags={"d2f.kind": "evaluation", **{f"d2f.{role}": uri for role, uri in job.pins.models.items()}},
        metrics=metrics,
        counts=config.evaluations,
        files={**files, PINS_NAME: job.pins.to_json()},
        values={"gate_passed": float(results["gate"]["verdict"]["passed"])},
    )
