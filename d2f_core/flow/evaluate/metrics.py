"""All metrics of all models of an evaluation, computed on the cluster."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray

from d2f_core.data.manifest import Manifest
from d2f_core.evaluation.config import parse_metric
from d2f_core.evaluation.estimates import Estimate, Metric
from d2f_core.flow.evaluate.compared_models import EvaluateJob
from d2f_core.flow.evaluate.config import EvaluateConfig
from d2f_core.flow.evaluate.extract_features import extract_features, score_key
from d2f_core.flow.evaluate.feature_table import Place, floor_of, gather_features, memorised, usable_rows
from d2f_core.flow.evaluate.image_metrics import (
    MADE_DRAWS,
    REAL_DRAWS,
    at_random,
    failed_share,
    measure,
    model_distance,
)
from d2f_core.flow.evaluate.memorisation import Memorisation
from d2f_core.flow.evaluate.plain_metrics import plain_metrics
from d2f_core.storage import join

TRAINING = "training"
TITLES = {
    "frechet": ("Fréchet distance", False),
    "kernel": ("Kernel distance", False),
    "precision": ("Precision", True),
    "recall": ("Recall", True),
    "clip_score": ("CLIP score", True),
    "failed": ("Share of failed images", False),
}
"""Short name -> (title in reports, whether higher is better)."""


def measured_names(config: EvaluateConfig) -> set[str]:
    """Short names of the metrics that these settings measure."""
    return set(TITLES) - (set() if config.score.clip else {"clip_score"})


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an evaluation measured on its images."""

    metrics: dict[str, Metric]
    """By short name."""
    distances: dict[str, dict[int, Estimate]]
    """The other models' distance to the candidate, by role and number of evaluations."""
    compared: dict[int, int]
    """By number of evaluations: prompts that both the candidate and the model that it is judged against made."""
    memorisation: Memorisation | str
    """Whether the candidate repeats its training images; or why that was not tested."""
    overlap: int
    """Images of the reference that the candidate was trained on, where these are known."""


def measure_all(job: EvaluateJob) -> Measured:
    """Every metric of every model; the candidate and the model that it is judged against on the prompts that both
    made. Needs a running Ray.
    """
    config, tables = job.config, _features(job)
    real = tables["reference"]
    real_steps = max(job.reference.fingerprint["steps"]) if job.reference.kind == "generations" else 0
    points = {(compared.role, count): compared for compared in job.compared for count in config.evaluations}
    seen = {point: tables[each.role].usable(each.steps(point[1])) for point, each in points.items()}
    usable: dict[tuple[str, int], np.ndarray] = dict(zip(seen, ray.get(list(seen.values())), strict=True))
    chosen = chosen_rows(usable, job.rival, config.measure.paired_rows)
    real_only = at_random(np.ones(real.manifest.counts["set"], bool), config.measure.paired_rows, REAL_DRAWS)
    real_set = real.gather(job, real_steps, REAL_DRAWS, real_only)
    made = {
        point: tables[each.role].gather(job, each.steps(point[1]), MADE_DRAWS, chosen[point])
        for point, each in points.items()
    }
    measured, distance = cast(Any, ray.remote(measure)), cast(Any, ray.remote(model_distance))
    copies = _memorised(job, tables)
    places = {(role, count): tables[role].place(each.steps(count)) for (role, count), each in points.items()}
    plain = plain_metrics(job, real.place(real_steps), places)
    floor = real.floor(job, real_steps, int(next(iter(chosen.values())).sum()))
    pending = [measured.remote(real_set, each, config.measure) for each in made.values()]
    apart = {
        (role, count): distance.remote(made["candidate", count], each)
        for (role, count), each in made.items()
        if role != "candidate"
    }
    distances: dict[str, dict[int, Estimate]] = {}
    for (role, count), estimate in zip(apart, ray.get(list(apart.values())), strict=True):
        if estimate is not None:
            distances.setdefault(role, {})[count] = estimate
    found = dict(zip(made, ray.get(pending), strict=True))
    for point, mask in usable.items():
        found[point]["failed"] = failed_share(mask)
    return Measured(
        memorisation=ray.get(copies) if copies else "no table of training images is given",
        overlap=len(job.known.overlap),
        metrics=_by_metric(job, found, ray.get(floor)) | plain,
        distances=distances,
        compared={count: int(chosen["candidate", count].sum()) for count in config.evaluations},
    )


def _memorised(job: EvaluateJob, tables: Mapping[str, "_FeatureTable"]) -> Any:
    """The test for repeated training images, as a Ray object reference; None without a table of these.

    The images are those at the deciding metric's number of evaluations.
    """
    training = tables.get(TRAINING)
    if training is None:
        return None
    if job.reference.kind == "generations":
        return ray.put("the reference is a generation, not held-out images")
    count = parse_metric(job.config.gate.metric)[1] or max(job.config.evaluations)
    made, reference = tables["candidate"], tables["reference"]
    steps = job.compared[0].steps(count)
    drawn, known, held = made.place(steps), training.place(), reference.place()
    return ray.remote(memorised).remote(drawn, known, held, job.known, job.dimensions, job.config.measure)


def chosen_rows(
    usable: Mapping[tuple[str, int], np.ndarray], rival: str | None, most: int
) -> dict[tuple[str, int], np.ndarray]:
    """Bool [prompts] by role and number of evaluations: the prompts on which each is measured.

    The candidate and its rival are measured on those that both made, another role on those of these that it made.
    """
    chosen = {}
    for (role, count), mask in usable.items():
        both = usable["candidate", count] & usable.get((rival or "candidate", count), mask)
        chosen[role, count] = at_random(both, most, MADE_DRAWS) & mask
    return chosen


def _by_metric(
    job: EvaluateJob, found: dict[tuple[str, int], dict[str, Estimate]], floor: dict[str, Estimate]
) -> dict[str, Metric]:
    metrics = {}
    for short in sorted(measured_names(job.config), key=list(TITLES).index):
        title, higher = TITLES[short]
        values: dict[str, dict[int, Estimate]] = {}
        for (role, count), estimates in found.items():
            if short in estimates:
                values.setdefault(role, {})[count] = estimates[short]
        if short == "clip_score":
            name = f"{short}_{Path(job.config.score.clip.rstrip('/')).name}"
        else:
            name = short if short == "failed" else f"{short}_{job.feature_name}"
        metrics[short] = Metric(name=name, title=title, higher_is_better=higher, values=values, floor=floor.get(short))
    return metrics


@dataclass(frozen=True, kw_only=True)
class _FeatureTable:
    uri: str
    manifest: Manifest

    def gather(self, job: EvaluateJob, steps: int, draws: int, only: np.ndarray | None = None) -> Any:
        """The image set at one number of steps (0: real images), as a Ray object reference."""
        return ray.remote(gather_features).remote(self.place(steps), job.dimensions, job.config.measure, draws, only)

    def place(self, steps: int = 0) -> Place:
        """Where the images of one number of steps (0: real images) are read."""
        return self.uri, self.manifest, steps

    def usable(self, steps: int) -> Any:
        """Which images there are, as a Ray object reference."""
        return ray.remote(usable_rows).remote(self.uri, self.manifest, steps)

    def floor(self, job: EvaluateJob, steps: int, made: int) -> Any:
        """What `made` images of the table's own distribution would measure, as a Ray object reference."""
        return ray.remote(floor_of).remote(self.place(steps), job.dimensions, made, job.config.measure)


def _features(job: EvaluateJob) -> dict[str, _FeatureTable]:
    """The feature tables of the real images, of the training's, and of every role's."""
    sources = {"reference": job.config.reference, **{each.role: each.images for each in job.compared}}
    if job.config.training:
        sources[TRAINING] = job.config.training
    most = job.config.training_images
    keys = {name: {"most_images": most} if name == TRAINING else {} for name in sources}
    places = {
        name: join(job.config.output, "features", f"{name}-{score_key(source, {**job.fingerprint, **keys[name]})}")
        for name, source in sources.items()
    }
    made = extract_features(
        {places[name]: source for name, source in sources.items()}, job.config.score, job.fingerprint,
        {places[name]: most for name in sources if name == TRAINING},
    )  # fmt: skip
    return {name: _FeatureTable(uri=uri, manifest=made[uri]) for name, uri in places.items()}
