"""Errors of predicted against true depth: per image, of baselines without a model, and with confidence intervals.

Every prediction is resized to the truth and fitted to it by one scale and shift, as depth is predicted up to these.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image

from d2f_core.data.depth import crop_and_resize
from d2f_core.evaluation.bootstrap import bootstrap_counts
from d2f_core.evaluation.estimates import Estimate, Metric
from d2f_core.flow.depth.config import FLOORS
from d2f_core.flow.depth.metrics import DELTA_BASE, METRICS, align_scale_shift, depth_metrics

Array = np.ndarray
FLOOR_METRES = 1e-3
"""Smallest depth after the fit, in metres; the fit itself may give values below 0."""
TITLES: Mapping[str, str] = MappingProxyType(
    {
        "abs_rel": "AbsRel", "sq_rel": "SqRel (m)", "rmse": "RMSE (m)", "rmse_log": "RMSE log", "log10": "log10",
        "silog": "SILog", **{f"delta{power}": f"delta < {DELTA_BASE}^{power}" for power in (1, 2, 3)},
    }
)  # fmt: skip
RESAMPLING_SEED = 3


def square(values: Array) -> Array:
    """The centre square of a map [height, width], as images are cropped."""
    height, width = values.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return values[top : top + side, left : left + side]


def resized(prediction: Array, shape: tuple[int, int]) -> Array:
    """A map [height, width] at another size, bilinearly."""
    if prediction.shape == shape:
        return prediction
    image = Image.fromarray(np.ascontiguousarray(prediction, np.float32))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def aligned(prediction: Array, truth: Array) -> Array:
    """The prediction resized to the truth and fitted to it by least squares: metres [height, width].

    Args:
        truth: metres, NaN where depth is unknown.
    """
    valid = np.isfinite(truth)
    return align_scale_shift(resized(prediction, truth.shape)[None], truth[None], valid[None])[0]


def depth_errors(prediction: Array, truth: Array) -> dict[str, float]:
    """Every error of one image, after the fit."""
    valid = np.isfinite(truth)
    found = depth_metrics(aligned(prediction, truth)[None], truth[None], valid[None], floor=FLOOR_METRES)
    return {name: float(values[0]) for name, values in found.items()}


def mean_depth(truths: Iterable[Array], size: int) -> Array:
    """Pixel-wise mean [size, size] of true maps; pixels without any depth get the mean of all."""
    total, count = np.zeros((size, size)), np.zeros((size, size))
    for truth in truths:
        side = min(truth.shape)
        values = crop_and_resize(square(truth), (0, 0, side, side), size)
        total += np.nan_to_num(values)
        count += np.isfinite(values)
    return np.where(count, total / np.maximum(count, 1), total.sum() / max(count.sum(), 1)).astype(np.float32)


def floor_maps(mean: Array) -> dict[str, Array]:
    """Baseline maps that do not depend on the image, by name; each is fitted like a prediction."""
    size = len(mean)
    ramp = np.repeat(np.linspace(1, 0, size, dtype=np.float32)[:, None], size, axis=1)
    return dict(zip(FLOORS, (np.zeros_like(mean), ramp, mean), strict=True))


def estimates(
    errors: Mapping[str, Mapping[int, list[dict[str, float]]]], *, replicates: int = 200
) -> dict[str, Metric]:
    """Means over images with 95 % intervals, by metric, role and number of network evaluations (0 for floors).

    Args:
        errors: errors of each image, by role and number of evaluations; all for the same images.
    """
    images = len(next(iter(next(iter(errors.values())).values())))
    draws = bootstrap_counts(images, replicates, RESAMPLING_SEED)
    return {
        name: Metric(
            name=name,
            title=TITLES[name],
            higher_is_better=name.startswith("delta"),
            values={
                role: {count: _mean([each[name] for each in rows], draws) for count, rows in by_count.items()}
                for role, by_count in errors.items()
            },
        )
        for name in METRICS
    }


def _mean(values: list[float], draws: Array) -> Estimate:
    array = np.array(values)
    return Estimate.of(float(array.mean()), draws @ array / len(array), len(array))
