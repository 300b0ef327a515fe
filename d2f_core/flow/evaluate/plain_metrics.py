"""FID, KID and CMMD of every model of an evaluation, on all of its images: single values, without intervals.

A bootstrap at the network's full width would take hours, so what the gate compares is the projected distance instead.
"""

from collections.abc import Mapping
from pathlib import Path

import ray

from d2f_core.evaluation.estimates import Estimate, Metric
from d2f_core.flow.evaluate.compared_models import EvaluateJob
from d2f_core.flow.evaluate.distances import FrechetReference
from d2f_core.flow.evaluate.feature_table import Place
from d2f_core.flow.evaluate.plain_distances import PlainSet, cmmd, gather_plain, kid
from d2f_core.flow.evaluate.plain_table import read_plain
from d2f_core.flow.evaluate.projection import features_name

FID, KID, CMMD = "fid", "kid", "cmmd"
PLAIN = (FID, KID, CMMD)
"""Short names of the metrics, which have no interval."""
TITLES = {
    FID: "Fréchet distance of all features",
    KID: "Kernel distance of all features",
    CMMD: "CMMD",
}
INCEPTION = "inception-v3"
"""How the name of the network begins by whose features the distances are called FID and KID."""


def plain_metrics(job: EvaluateJob, reference: Place, made: Mapping[tuple[str, int], Place]) -> dict[str, Metric]:
    """The plain distances by short name; needs a running Ray.

    A Frechet distance needs more images than features on both sides, or its covariances are singular: else the metric
    says so in place of values.

    Args:
        made: feature tables by role and number of evaluations.
    """
    real = ray.remote(gathered).remote(reference, job.width)
    task = ray.remote(plain_distances)
    found = dict(zip(made, ray.get([task.remote(real, each, job.width) for each in made.values()]), strict=True))
    fewest = min((counts for counts, _ in found.values()), default=0)
    metrics = {}
    for short in PLAIN:
        values: dict[str, dict[int, Estimate]] = {}
        for (role, evaluations), (count, distances) in found.items():
            if short in distances:
                each = Estimate(value=distances[short], low=distances[short], high=distances[short], count=count)
                values.setdefault(role, {})[evaluations] = each
        missing = f"{fewest:,} images for {job.width:,} features" if short == FID and not values else ""
        if values or missing:
            metrics[short] = Metric(
                name=_name(job, short), title=_title(job, short), higher_is_better=False, values=values, missing=missing
            )
    return metrics


def gathered(place: Place, width: int) -> PlainSet:
    """What the distances need of the images of a feature table."""
    return gather_plain(read_plain(*place), total=place[1].counts["set"], width=width)


def plain_distances(real: PlainSet, place: Place, width: int) -> tuple[int, dict[str, float]]:
    """The smaller number of images of the two sets, and the distances that can be computed, by short name."""
    made = gathered(place, width)
    count = min(made.moments.count, real.moments.count)
    found = {}
    if count > width:
        found[FID] = FrechetReference.of(real.moments).distance(made.moments)
    if count > 1:
        found[KID] = kid(real.features, made.features)
        if real.clip_features is not None and made.clip_features is not None:
            found[CMMD] = cmmd(real.clip_features, made.clip_features)
    return count, found


def _name(job: EvaluateJob, short: str) -> str:
    if short == CMMD:
        return f"{CMMD}_{Path(job.config.score.clip.rstrip('/')).name}"
    return f"{'frechet' if short == FID else 'kernel'}_{features_name(job.network, job.width)}"


def _title(job: EvaluateJob, short: str) -> str:
    usual = short != CMMD and job.network.startswith(INCEPTION)
    return f"{TITLES[short]} ({short.upper()})" if usual else TITLES[short]
