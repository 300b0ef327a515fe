"""Evaluate a candidate beside champion and base: images of the same prompts and noises, scored, reported and judged.

    OUTPUT/models.json        which versions are compared
    OUTPUT/generations/ROLE   images and index of each model, at every number of network evaluations
    OUTPUT/features/NAME-KEY  features of these and of the real images
    OUTPUT/metrics.json       every value with its interval, and the gate's verdict
    OUTPUT/report.html        the same to look at

All of it is resumable: a second run goes on where a killed one was. The champion's alias moves last.
"""

import dataclasses
import datetime
import json
import logging
from typing import Any

import yaml

from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.evaluation.config import FLOW_LOSS
from d2f_core.evaluation.estimates import Estimate, Metric
from d2f_core.evaluation.gate import Verdict, check_gate, judge
from d2f_core.flow.evaluate.compared_models import (
    PINS_NAME,
    REGISTERED,
    VALIDATION_LOSS,
    ComparedModel,
    carried_sampling,
    keep_pins,
    make_compared_model,
    pin_models,
    registered_name,
    validation_loss,
)
from d2f_core.flow.evaluate.config import EvaluateConfig, EvaluateError
from d2f_core.flow.evaluate.feature_networks import CaptionScorer, load_features
from d2f_core.flow.evaluate.metrics import EvaluateJob, measure_all, measured_names
from d2f_core.flow.evaluate.report import render_report, shown_images
from d2f_core.flow.evaluate.straightness import follow_all
from d2f_core.flow.generate.job import generate_all
from d2f_core.storage import check_reachable, join, write_bytes
from d2f_core.tracking import check_tracking, get_alias, promote, start_run

logger = logging.getLogger(__name__)

METRICS_NAME, REPORT_NAME = "metrics.json", "report.html"


def check_evaluate(config: EvaluateConfig) -> EvaluateJob:
    """Check everything that can be checked before a cluster is used.

    Raises:
        ValueError: unusable storage, models, prompts, features or gate; one line each.
    """
    config.check_complete()
    check_reachable(config.output, write=True)
    if config.experiment or config.candidate.startswith(REGISTERED):
        check_tracking()
    per_model_names = {FLOW_LOSS} | ({"straightness"} if config.straightness_prompts else set())
    check_gate(config.gate, measured_names(config) | per_model_names, config.evaluations)
    reference = read_reference(config)
    features = load_features(config.score.features, dimensions=config.score.dimensions)
    clip = CaptionScorer(config.score.clip).model.as_network().fingerprint if config.score.clip else ""
    pins = pin_models(config)
    wanted = {role: uri for role, uri in pins.items() if uri and not (role == "champion" and uri == pins["candidate"])}
    # Images of different sizes cannot be compared: all models draw what the candidate was made for.
    edge = config.resolution or carried_sampling(pins["candidate"]).get("resolution")
    return EvaluateJob(
        config=config,
        pins=pins,
        contenders=tuple(make_compared_model(config, role, uri, edge) for role, uri in wanted.items()),
        feature_name=features.name,
        dimensions=features.dimensions,
        fingerprint={"features": features.name, "network": features.network.fingerprint, "clip": clip},
        reference=reference,
    )


def read_reference(config: EvaluateConfig) -> Manifest:
    """What the real images are.

    Raises:
        ValueError: unreachable, no table of images, or too few of them.
    """
    check_reachable(config.reference)
    reference = read_manifest(config.reference)
    if reference.kind not in ("images", "generations"):
        raise EvaluateError(f"reference={config.reference!r} is a table of {reference.kind}. Give real images.")
    if reference.num_rows < 4 * (config.measure.neighbours + 1):
        raise EvaluateError(f"reference={config.reference!r} has {reference.num_rows} images. Give more.")
    return reference


def evaluate(job: EvaluateJob) -> Verdict:
    """Generate, score, judge, report; then move the champion's alias when the gate passes. Needs a running Ray.

    Raises:
        ValueError: an output of another evaluation, or a cluster or server that cannot be used.
    """
    config = job.config
    keep_pins(config, job.pins)
    for compared in job.contenders:
        logger.info("the %s is %s", compared.role, compared.uri)
    generate_all([compared.job for compared in job.contenders])
    metrics, distances = measure_all(job)
    paths = follow_all(job)
    losses = {each.role: loss for each in job.contenders if (loss := validation_loss(each.uri)) is not None}
    verdict = judge(config.gate, metrics | per_model(paths, losses), {compared.role for compared in job.contenders})
    if job.pins["champion"] == job.pins["candidate"]:
        verdict = dataclasses.replace(verdict, passed=False, reason="the candidate is the champion already")
    results = _results(job, metrics, distances, paths, losses, verdict)
    _store(job, results, metrics)
    if verdict.passed and config.promote and registered_name(job.pins["candidate"]):
        _promote(job)
    logger.info("gate: %s: %s", "passed" if verdict.passed else "not passed", verdict.reason)
    return verdict


def per_model(paths: dict[str, Estimate], losses: dict[str, float]) -> dict[str, Metric]:
    """What the gate may ask of a model at whatever number of evaluations."""
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
    """The contents of metrics.json."""
    config = job.config
    name = registered_name(job.pins["candidate"])
    promotes = verdict.passed and config.promote and bool(name)
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "models": [_model(compared, paths, losses) for compared in job.contenders],
        "features": {**job.fingerprint, "uri": config.score.features},
        "prompts": {"uri": config.prompts, "count": job.contenders[0].job.prompts.num_rows, "seed": config.seed},
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
        "gate": {**dataclasses.asdict(config.gate), "verdict": verdict.to_json()},
        "promotion": f"{job.pins['candidate']} becomes @{config.champion_alias}" if promotes else None,
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


def _store(job: EvaluateJob, results: dict[str, Any], metrics: dict[str, Metric]) -> None:
    """Write results and report to the output, and to an MLflow run of their own."""
    config = job.config
    shown = shown_images({each.role: each.images for each in job.contenders}, config.shown_prompts)
    files = {
        METRICS_NAME: json.dumps(results, indent=1, allow_nan=False).encode(),
        REPORT_NAME: render_report(results, shown).encode(),
        PINS_NAME: json.dumps(job.pins, indent=1).encode(),
    }
    for name in (METRICS_NAME, REPORT_NAME):
        write_bytes(join(config.output, name), files[name])
    if not config.experiment:
        return
    run = start_run(
        experiment=config.experiment,
        run_key=config.output,
        name=f"evaluate {job.pins['candidate'].removeprefix(REGISTERED)}",
        config_yaml=yaml.safe_dump(dataclasses.asdict(config), sort_keys=False),
        params=dataclasses.asdict(config),
        tags={"d2f.kind": "evaluation", **{f"d2f.{role}": uri for role, uri in job.pins.items() if uri}},
    )
    for count in config.evaluations:
        run.log_metrics(count, _at(metrics, count))
    run.log_metrics(0, {"gate_passed": float(results["gate"]["verdict"]["passed"])})
    run.log_files(files)
    run.finish()
    logger.info("MLflow run: %s", run.url)


def _at(metrics: dict[str, Metric], count: int) -> dict[str, float]:
    """What the run gets at the step `count`, so that its charts are against network evaluations."""
    return {
        f"{role}/{metric.name}": values[count].value
        for metric in metrics.values()
        for role, values in metric.values.items()
        if count in values
    }


def _promote(job: EvaluateJob) -> None:
    """Move the alias, unless it has moved since the evaluation began."""
    candidate, alias = job.pins["candidate"], job.config.champion_alias
    name, version = registered_name(candidate), candidate.rsplit("/", 1)[-1]
    now = get_alias(name, alias)
    if now == version:
        return
    if job.config.champion == "auto" and now != (job.pins["champion"].rsplit("/", 1)[-1] or None):
        raise EvaluateError(
            f"{name}@{alias} moved to version {now} while this evaluation ran against "
            f"{job.pins['champion'] or 'none'}. Evaluate again at another output."
        )
    promote(name, version, alias)
    logger.info("%s@%s is now version %s", name, alias, version)
