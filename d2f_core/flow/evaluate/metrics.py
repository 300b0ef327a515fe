"""All metrics of all models of an evaluation, computed on the cluster."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray

from d2f_core.data.manifest import Manifest
from d2f_core.evaluation.estimates import Estimate, Metric
from d2f_core.flow.evaluate.compared_models import EvaluateJob
from d2f_core.flow.evaluate.config import EvaluateConfig
from d2f_core.flow.evaluate.extract_features import extract_features, score_key
from d2f_core.flow.evaluate.feature_table import gather_features
from d2f_core.flow.evaluate.image_metrics import MADE_DRAWS, REAL_DRAWS, measure, model_distance
from d2f_core.storage import join

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


def measure_all(job: EvaluateJob) -> tuple[dict[str, Metric], dict[str, dict[int, Estimate]]]:
    """All metrics by short name, and the other models' distance to the candidate by role and number of evaluations."""
    config = job.config
    measured, distance = cast(Any, ray.remote(measure)), cast(Any, ray.remote(model_distance))
    tables = _features(job)
    real = tables["reference"]
    real_steps = max(job.reference.fingerprint["steps"]) if job.reference.kind == "generations" else 0
    real_set = real.gather(job, real_steps, REAL_DRAWS)
    made: dict[tuple[str, int], Any] = {}
    for compared in job.compared:
        for count in config.evaluations:
            made[compared.role, count] = tables[compared.role].gather(job, compared.steps(count), MADE_DRAWS)
    total = real.manifest.counts["set"]
    half = np.random.Generator(np.random.Philox(0)).permutation(total) < total // 2
    halves = [real.gather(job, real_steps, draws, only) for draws, only in ((REAL_DRAWS, half), (MADE_DRAWS, ~half))]
    floor = measured.remote(*halves, config.measure)
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
    return _by_metric(job, dict(zip(made, ray.get(pending), strict=True)), ray.get(floor)), distances


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
        kept = floor.get(short) if short not in ("failed", "clip_score") else None
        metrics[short] = Metric(name=name, title=title, higher_is_better=higher, values=values, floor=kept)
    return metrics


@dataclass(frozen=True, kw_only=True)
class _FeatureTable:
    uri: str
    manifest: Manifest

    def gather(self, job: EvaluateJob, steps: int, draws: int, only: np.ndarray | None = None) -> Any:
        """The image set at one number of steps (0: real images), as a Ray object reference."""
        config = job.config.measure
        return ray.remote(gather_features).remote(self.uri, self.manifest, steps, job.dimensions, config, draws, only)


def _features(job: EvaluateJob) -> dict[str, _FeatureTable]:
    """The feature tables of the real images and of every role's images."""
    sources = {"reference": job.config.reference, **{each.role: each.images for each in job.compared}}
    places = {
        name: join(job.config.output, "features", f"{name}-{score_key(source, job.fingerprint)}")
        for name, source in sources.items()
    }
    made = extract_features(
        {places[name]: source for name, source in sources.items()}, job.config.score, job.fingerprint
    )
    return {name: _FeatureTable(uri=uri, manifest=made[uri]) for name, uri in places.items()}
