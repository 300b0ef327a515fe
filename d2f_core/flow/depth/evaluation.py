"""Compare finished depth predictions with a depth table: errors with intervals, floors, a figure and a sheet.

OUTPUT/depth_metrics.json    every value with its interval
OUTPUT/depth.png             errors against network evaluations
OUTPUT/depth_sheet.png       image, truth and predictions of the first images
"""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from d2f_core.batch.output import read_index
from d2f_core.data.depth import crop_and_resize
from d2f_core.data.depth_files import decode_depth, decode_npy
from d2f_core.data.images import to_rgb
from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.data.table_reader import RowReader
from d2f_core.evaluation.estimates import Metric
from d2f_core.evaluation.record import log_evaluation, write_files
from d2f_core.flow.depth.config import DepthEvaluationError, EvaluateDepthConfig
from d2f_core.flow.depth.errors import depth_errors, estimates, floor_maps, mean_depth, square
from d2f_core.flow.depth.figures import ShownDepth, draw_errors, draw_maps
from d2f_core.flow.depth.metrics import NoValidPixelsError
from d2f_core.storage import check_reachable, read_bytes
from d2f_core.tracking import check_tracking

METRICS_NAME, FIGURE_NAME, SHEET_NAME = "depth_metrics.json", "depth.png", "depth_sheet.png"
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class _Predictor:
    """A model's predictions at one number of network evaluations."""

    role: str
    evaluations: int
    maps: Mapping[str, tuple[str, int]]
    """Sample id -> (URI of the map, its height and width in pixels)."""

    def read(self, sample_id: str) -> np.ndarray:
        uri, edge = self.maps[sample_id]
        return decode_npy(read_bytes(uri), edge * edge).reshape(edge, edge)


@dataclass(frozen=True, kw_only=True)
class EvaluateDepthJob:
    """A checked job that is ready to run."""

    config: EvaluateDepthConfig
    truth: Manifest
    models: Mapping[str, Mapping[str, Any]]
    """By title: the model's URI and hash, and its sampling settings."""
    predictors: tuple[_Predictor, ...]


def check_evaluate_depth(config: EvaluateDepthConfig) -> EvaluateDepthJob:
    """Read the outputs' index tables and check them.

    Raises:
        ValueError: a setting is missing, a table has another kind, or storage is unusable.
    """
    for name in ("predictions", "truth", "output"):
        if not getattr(config, name):
            raise DepthEvaluationError(f"{name} is empty. Give --{name} URI.")
    check_reachable(config.output, write=True)
    if config.experiment:
        check_tracking()
    truth = _depth_table(config.truth)
    if config.train:
        _depth_table(config.train)
    predictors, models = [], {}
    for number, uri in enumerate(config.predictions):
        fingerprint = read_manifest(uri).fingerprint
        if fingerprint.get("task") != "image_to_depth":
            raise DepthEvaluationError(f"{uri!r} holds no depth maps. Give an output of pipelines.predict_depth.")
        index = read_index(uri)
        title = config.titles[number] if config.titles else index["model_uri"][0].as_py()
        if title in models:
            raise DepthEvaluationError(f"{uri!r} is a second output of {title!r}. Tell them apart: --titles A B.")
        models[title] = {"uri": index["model_uri"][0].as_py(), **fingerprint}
        predictors += _predictors(title, uri, index)
    return EvaluateDepthJob(config=config, truth=truth, models=models, predictors=tuple(predictors))


def _depth_table(uri: str) -> Manifest:
    manifest = read_manifest(uri)
    if manifest.kind != "depth":
        raise DepthEvaluationError(f"{uri!r} is a table of {manifest.kind}, not of depth. Give a depth table.")
    return manifest


def _predictors(role: str, uri: str, index: pa.Table) -> list[_Predictor]:
    """One predictor per number of steps. An adaptive solver's evaluations vary between batches: their mean is used."""
    by_steps: dict[int, list[dict[str, Any]]] = {}
    for row in index.to_pylist():
        by_steps.setdefault(row["steps"], []).append(row)
    found = []
    for steps, rows in sorted(by_steps.items()):
        good = [row for row in rows if row["error"] is None]
        if not good:
            raise DepthEvaluationError(
                f"{uri!r} has no map at {steps} steps: all {len(rows)} failed, the first with {rows[0]['error']!r}. "
                "Predict again with a model and settings that work."
            )
        evaluations = round(sum(row["num_evaluations"] for row in good) / len(good))
        maps = {row["sample_id"]: (row["depth_uri"], row["resolution"]) for row in good}
        found.append(_Predictor(role, evaluations, maps))
    return found


def evaluate_depth(job: EvaluateDepthJob) -> dict[str, Any]:
    """Measure, draw, write and log; returns the contents of the JSON file.

    Raises:
        DepthEvaluationError: no image has both ground truth and a prediction of every model.
    """
    config = job.config
    trained_on = config.train or config.truth
    truths = (decode_depth(row["depth"]) for row in _rows(trained_on, read_manifest(trained_on), ("depth",)))
    floors = floor_maps(mean_depth(truths, _edge(job)))
    errors: dict[str, dict[int, list[dict[str, float]]]] = {name: {0: []} for name in floors}
    shown: list[ShownDepth] = []
    left_out = 0
    for row in _rows(config.truth, job.truth, ("sample_id", "image", "depth")):
        name, truth = row["sample_id"], square(decode_depth(row["depth"]))
        if any(name not in predictor.maps for predictor in job.predictors):
            left_out += 1
            continue
        maps = [predictor.read(name) for predictor in job.predictors]
        try:
            for floor, values in floors.items():
                errors[floor][0].append(depth_errors(values, truth))
            for predictor, values in zip(job.predictors, maps, strict=True):
                by_count = errors.setdefault(predictor.role, {})
                by_count.setdefault(predictor.evaluations, []).append(depth_errors(values, truth))
        except NoValidPixelsError:
            raise DepthEvaluationError(
                f"{name} of {config.truth!r} has {int(np.isfinite(truth).sum())} pixels with a depth in its centre "
                "square; the fit needs 2. Leave it out of the table."
            ) from None
        if len(shown) < config.shown:
            shown.append(_shown(row["image"], truth, job, maps))
    if not shown:
        raise DepthEvaluationError(
            f"No image of {config.truth!r} has a map by every model ({left_out} have not). Predict the depth of this "
            "table's images first."
        )
    metrics = estimates(errors, replicates=config.replicates)
    results = _results(job, metrics, left_out)
    _store(job, results, metrics, shown)
    return results


def _edge(job: EvaluateDepthJob) -> int:
    return max(edge for predictor in job.predictors for _, edge in predictor.maps.values())


def _rows(uri: str, manifest: Manifest, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    reader = RowReader(uri, manifest, columns)
    for start in range(0, manifest.num_rows, ROWS_AT_ONCE):
        yield from reader.read(np.arange(start, min(start + ROWS_AT_ONCE, manifest.num_rows))).to_pylist()


def _shown(image: bytes, truth: np.ndarray, job: EvaluateDepthJob, maps: list[np.ndarray]) -> ShownDepth:
    pixels = np.asarray(to_rgb(Image.open(io.BytesIO(image))))
    channels = [square(pixels[..., channel]) for channel in range(3)]
    side = len(truth)
    whole = (0, 0, len(channels[0]), len(channels[0]))
    several = len({predictor.role for predictor in job.predictors}) > 1
    headings = [
        f"{predictor.role}\n{predictor.evaluations}"
        if several
        else f"{predictor.evaluations} evaluation{'s' * (predictor.evaluations != 1)}"
        for predictor in job.predictors
    ]
    return ShownDepth(
        image=np.stack([crop_and_resize(channel, whole, side) for channel in channels], axis=2),
        truth=truth,
        predictions=dict(zip(headings, maps, strict=True)),
    )


def _results(job: EvaluateDepthJob, metrics: Mapping[str, Metric], left_out: int) -> dict[str, Any]:
    images = next(iter(next(iter(metrics["abs_rel"].values.values())).values())).count
    return {
        "truth": {"uri": job.config.truth, "digest": job.truth.digest},
        "images": images,
        "left_out": left_out,
        "alignment": "scale and shift per image, least squares on the valid pixels",
        "intervals": f"95 %, bootstrap over images, {job.config.replicates} replicates",
        "floor_mean_of": job.config.train or job.config.truth,
        "models": dict(job.models),
        "metrics": {name: metric.to_json() for name, metric in metrics.items()},
    }


def _store(
    job: EvaluateDepthJob, results: dict[str, Any], metrics: Mapping[str, Metric], shown: list[ShownDepth]
) -> None:
    """Write results and pictures to the output and to a new MLflow run."""
    config = job.config
    title = f"{results['images']} images"
    files = {
        METRICS_NAME: json.dumps(results, indent=1, allow_nan=False).encode(),
        FIGURE_NAME: draw_errors(metrics, title),
        SHEET_NAME: draw_maps(shown, title),
    }
    write_files(config.output, files)
    log_evaluation(
        config,
        name=f"depth {' '.join(job.models)}",
        tags={"d2f.kind": "depth evaluation", "d2f.truth": config.truth},
        metrics=metrics,
        counts=sorted({predictor.evaluations for predictor in job.predictors} | {0}),
        files=files,
    )
