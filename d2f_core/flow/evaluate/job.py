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

import json
import logging
from dataclasses import replace

from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.evaluation.config import FLOW_LOSS
from d2f_core.evaluation.estimates import Metric
from d2f_core.evaluation.gate import ENOUGH_PROMPTS, Verdict, check_gate, expected_power, judge
from d2f_core.evaluation.pins import PINS_NAME, REGISTERED, keep_pins, pin_models, registered_name
from d2f_core.evaluation.promotion import Promotion, check_may_promote, promote_candidate
from d2f_core.evaluation.record import log_evaluation, write_files
from d2f_core.flow.evaluate.compared_models import EvaluateJob, compared_models
from d2f_core.flow.evaluate.config import AUTO, EvaluateConfig, EvaluateError
from d2f_core.flow.evaluate.feature_networks import CaptionScorer, load_features
from d2f_core.flow.evaluate.held_out import filled
from d2f_core.flow.evaluate.held_out_loss import held_out_loss
from d2f_core.flow.evaluate.memorisation import memorisation_rule
from d2f_core.flow.evaluate.metrics import measure_all, measured_names
from d2f_core.flow.evaluate.plain_metrics import CMMD, PLAIN
from d2f_core.flow.evaluate.projection import projected_width
from d2f_core.flow.evaluate.report import ShownPrompt, render_report, shown_images
from d2f_core.flow.evaluate.results import Outcome, finite, guidance_rule, notes, results_of
from d2f_core.flow.evaluate.straightness import follow_all
from d2f_core.flow.generate.job import generate_all
from d2f_core.storage import check_reachable
from d2f_core.tracking import check_tracking

logger = logging.getLogger(__name__)

METRICS_NAME, REPORT_NAME = "metrics.json", "report.html"
MOST_BYTES = 10**9
"""Of the resampled covariances of one set of images."""


def check_evaluate(config: EvaluateConfig, scratch: str = "") -> EvaluateJob:
    """Check everything that can be checked before a cluster is used.

    Args:
        scratch: where a reference or prompts that were not given are written; empty: at the output.

    Raises:
        ValueError: unusable storage, models, prompts, features or gate; one line each.
    """
    config.check_complete()
    check_reachable(config.output, write=True)
    for uri in (config.candidate, config.champion, config.base):
        check_reachable(uri)
    if config.experiment or config.candidate.startswith(REGISTERED):
        check_tracking()
    check_rules(config)
    features = load_features(config.score.features, resize=config.score.resize, device="meta")
    check_dimensions(config, features.width)
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
    config, known = filled(config, pins.candidate, scratch)
    reference = read_reference(config)
    compared = compared_models(config, pins)
    prompts = compared[0].job.prompts.num_rows
    if expected := expected_power(config.gate, prompts, config.measure.paired_rows):
        log = logger.warning if prompts < ENOUGH_PROMPTS else logger.info
        log("gate: %s", expected)
    return EvaluateJob(
        config=config,
        pins=pins,
        compared=compared,
        network=features.network.name,
        width=features.width,
        dimensions=projected_width(features.width, config.score.dimensions),
        fingerprint={"features": features.name, "network": features.fingerprint, "clip": clip},
        reference=reference,
        known=known,
    )


def check_rules(config: EvaluateConfig) -> None:
    """Raise ValueError if the gate has a rule about what these settings do not measure."""
    plain = set(PLAIN) - (set() if config.score.clip else {CMMD})
    per_model_names = {FLOW_LOSS} | ({"straightness"} if config.straightness_prompts else set())
    check_gate(config.gate, measured_names(config) | per_model_names, config.evaluations, plain=plain)
    if FLOW_LOSS in (config.gate.metric, *(limit.metric for limit in config.gate.limits)) and not config.loss_rows:
        raise EvaluateError(f"gate: {FLOW_LOSS!r} decides, and loss_rows is 0. Give --loss-rows 128.")


def check_dimensions(config: EvaluateConfig, width: int) -> None:
    """Raise EvaluateError if the resampled covariances of a set, one for each replicate, would not fit into memory."""
    dimensions = projected_width(width, config.score.dimensions)
    held = config.measure.replicates * dimensions**2 * 8
    if held > MOST_BYTES:
        raise EvaluateError(
            f"score.dimensions={config.score.dimensions} compares {dimensions} dimensions, whose "
            f"{config.measure.replicates} resampled covariances are {held / 1e9:.1f} GB for each set of images. Give "
            f"--score.dimensions 64; FID and KID are of all {width} anyway."
        )


def read_reference(config: EvaluateConfig) -> Manifest:
    """The manifest of the real images.

    Raises:
        ValueError: the reference (or the training's table) is not reachable, is no table of images, or has too few.
    """
    check_reachable(config.reference)
    reference = read_manifest(config.reference)
    if config.training not in ("", AUTO):
        check_reachable(config.training)
        if (kind := read_manifest(config.training).kind) != "images":
            raise EvaluateError(
                f"training={config.training!r} is a table of {kind}. Give the images trained on, or ''."
            )
    if reference.kind not in ("images", "generations"):
        raise EvaluateError(f"reference={config.reference!r} is a table of {reference.kind}. Give real images.")
    if reference.num_rows < config.fewest_images:
        raise EvaluateError(
            f"reference={config.reference!r} has {reference.num_rows} images. Give {config.fewest_images} or more."
        )
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
    outcome = _judged(job)
    _log(outcome.verdict)
    shown = shown_images({each.role: each.images for each in job.compared}, config.shown_prompts)
    files = report_files(job, outcome, shown, None)  # what cannot be written is found before the alias moves
    promotion = None
    if outcome.verdict.passed and config.promote and registered_name(job.pins.candidate):
        promotion = promote_candidate(job.pins, config.output, alias=config.champion_alias)
        files = report_files(job, outcome, shown, promotion)
    _store(job, outcome, files, promotion)
    if promotion and promotion.error:
        raise promotion.error
    return outcome.verdict


def report_files(
    job: EvaluateJob, outcome: Outcome, shown: list[ShownPrompt], promotion: Promotion | None
) -> dict[str, bytes]:
    """The evaluation's files by name."""
    results = finite({**results_of(job, outcome), "promotion": promotion and promotion.text})
    return {
        METRICS_NAME: json.dumps(results, indent=1, allow_nan=False).encode(),
        REPORT_NAME: render_report(results, shown).encode(),
    }


def _judged(job: EvaluateJob) -> Outcome:
    """Measure everything, and apply the gate's rules."""
    measured, paths, losses = measure_all(job), follow_all(job), held_out_loss(job)
    straightness = Metric(
        name="straightness",
        title="straightness",
        higher_is_better=False,
        values={role: {0: each} for role, each in paths.items()},
    )
    verdict = judge(
        job.config.gate,
        measured.metrics | {"straightness": straightness, FLOW_LOSS: losses},
        {compared.role for compared in job.compared},
        also=[*guidance_rule(job), memorisation_rule(measured.memorisation, job.config.gate)],
        notes=notes(job, measured),
    )
    if job.pins.champion == job.pins.candidate:
        verdict = replace(verdict, passed=False, reason="the candidate is the champion already")
    return Outcome(measured=measured, paths=paths, losses=losses, verdict=verdict)


def _log(verdict: Verdict) -> None:
    logger.info("gate: %s: %s", "passed" if verdict.passed else "not passed", verdict.reason)
    if verdict.power:
        logger.info("gate: %s", verdict.power)
    for line in (*verdict.notes, *(rule.rule for rule in verdict.rules if not rule.applied)):
        logger.info("gate: note: %s", line)


def _store(job: EvaluateJob, outcome: Outcome, files: dict[str, bytes], promotion: Promotion | None) -> None:
    """Write the files to the output and to a new MLflow run.

    Raises:
        UnreachableError: what the promotion ended in, once the files are written; MLflow would be asked in vain.
    """
    config = job.config
    write_files(config.output, files)
    if promotion and promotion.error and promotion.unknown:
        raise promotion.error
    log_evaluation(
        config,
        name=f"evaluate {job.pins.candidate.removeprefix(REGISTERED)}",
        tags={"d2f.kind": "evaluation", **{f"d2f.{role}": uri for role, uri in job.pins.models.items()}},
        metrics=outcome.measured.metrics,
        counts=config.evaluations,
        files={**files, PINS_NAME: job.pins.to_json()},
        values={
            "gate_passed": float(outcome.verdict.passed),
            **{f"{role}/{FLOW_LOSS}": values[0].value for role, values in outcome.losses.values.items()},
        },
    )
