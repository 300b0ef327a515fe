"""What an evaluation found, as the contents of metrics.json."""

import datetime
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from d2f_core.data.manifest import read_manifest
from d2f_core.evaluation.config import FLOW_LOSS
from d2f_core.evaluation.estimates import Estimate, Metric
from d2f_core.evaluation.gate import ENOUGH_PROMPTS, RuleResult, Verdict
from d2f_core.flow.evaluate.compared_models import ComparedModel, EvaluateJob, unequal
from d2f_core.flow.evaluate.memorisation import Memorisation
from d2f_core.flow.evaluate.metrics import Measured

FEW_PER_DIMENSION = 10
"""Images per compared dimension below which a bootstrap of a Frechet distance is too wide."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything that an evaluation found."""

    measured: Measured
    paths: Mapping[str, Estimate]
    """Straightness by role."""
    losses: Metric
    """Flow loss of the reference's images."""
    verdict: Verdict


def notes(job: EvaluateJob, measured: Measured) -> list[str]:
    """What a reader has to know to trust the comparison, one line each."""
    found = unequal(job.compared)
    count = job.compared[0].job.prompts.num_rows
    if count < ENOUGH_PROMPTS:
        found.append(f"{count:,} prompts, fewer than {ENOUGH_PROMPTS:,}, see large differences only")
    if measured.overlap:
        found.append(
            f"{measured.overlap:,} of the {job.reference.num_rows:,} reference images were trained on, which favours a "
            "model that knows them by heart"
        )
    if min(count, job.reference.num_rows) < FEW_PER_DIMENSION * job.dimensions:
        found.append(
            f"{min(count, job.reference.num_rows):,} images are few for {job.dimensions} dimensions: intervals are "
            "wider than need be, and what is seen is smaller than said"
        )
    for evaluations, compared in sorted(measured.compared.items()):
        if compared < min(count, job.config.measure.paired_rows):
            found.append(f"at {evaluations} evaluations, {compared:,} of {count:,} prompts are compared")
    return found


def guidance_rule(job: EvaluateJob) -> list[RuleResult]:
    """A champion is not judged, unasked, at a guidance that it was not made for; no rule where nobody is."""
    config = job.config
    if config.guidance is not None or config.own_guidance:
        return []
    return [
        RuleResult(
            rule=f"the champion draws at the guidance that it was made for ({own:g}; here all draw at the candidate's "
            f"{drawn:g}: give --guidance, or --own-guidance)",
            holds=own == drawn,
            metric="guidance",
            candidate=drawn,
            reference=own,
        )
        for each in job.compared
        if each.role == "champion" and (own := each.job.model.sampling.guidance) != (drawn := each.job.plan.guidance)
    ]


def finite(value: Any) -> Any:
    """JSON values with null in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def results_of(job: EvaluateJob, outcome: Outcome) -> dict[str, Any]:
    """The contents of metrics.json, but for the promotion."""
    config, measured = job.config, outcome.measured
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "models": [_model(compared, outcome) for compared in job.compared],
        "features": {**job.fingerprint, "uri": config.score.features, "measured": job.feature_name},
        "prompts": {
            "uri": config.prompts,
            "count": job.compared[0].job.prompts.num_rows,
            "digest": job.compared[0].job.prompts.digest,
            "seed": config.seed,
            "compared": {str(count): rows for count, rows in measured.compared.items()},
        },
        "reference": {"uri": config.reference, "count": job.reference.num_rows, "digest": job.reference.digest},
        "training": {
            "uri": config.training,
            "digest": read_manifest(config.training).digest if config.training else None,
            "memorisation": _memorisation(measured.memorisation),
        },
        "evaluations": sorted(config.evaluations),
        "intervals": f"95 %, bootstrap over images, {config.measure.replicates} replicates",
        "metrics": {short: metric.to_json() for short, metric in measured.metrics.items()},
        "distance_to_candidate": {
            "name": f"distance_{job.feature_name}",
            "values": {
                role: {str(count): each.to_json() for count, each in values.items()}
                for role, values in measured.distances.items()
            },
        },
        "gate": {**asdict(config.gate), "verdict": outcome.verdict.to_json()},
    }


def _memorisation(found: Memorisation | str) -> dict[str, Any]:
    return {"not_applied": found} if isinstance(found, str) else asdict(found)


def _model(compared: ComparedModel, outcome: Outcome) -> dict[str, Any]:
    plan, path = compared.job.plan, outcome.paths.get(compared.role)
    loss = outcome.losses.values.get(compared.role, {}).get(0)
    return {
        "role": compared.role,
        "uri": compared.uri,
        "sha256": plan.model_hash,
        "solver": plan.solver,
        "guidance": plan.guidance,
        "shift": plan.shift,
        "time_grid": plan.time_grid,
        "size": [plan.height, plan.width],
        "straightness": path and path.to_json(),
        FLOW_LOSS: loss and loss.to_json(),
    }
