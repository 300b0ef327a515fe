"""Error metrics of predicted depth maps, as in the depth literature: numpy only, one value per image.

Maps are [n, height, width]; `valid` is a bool mask of the same shape (default: all). Depths are in the target's unit.

Sources: Eigen et al., 2014, arXiv:1406.2283 (the errors); Ranftl et al., 2020, arXiv:1907.01341 (scale and shift).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

Array = np.ndarray
DELTA_BASE = 1.25


class DepthError(ValueError):
    """Depth maps cannot be compared; the message gives the reason and the fix."""


class DepthShapeError(DepthError):
    """Maps or masks have shapes that do not match."""


class NoValidPixelsError(DepthError):
    """An image has too few valid pixels for a metric, or for the alignment."""


class NonPositiveDepthError(DepthError):
    """A valid depth is not finite or not above 0, as logarithms and ratios require."""


Fit = tuple[float, float, float]
"""Scale, centre and level: a fitted map is `level + scale * (prediction - centre)`."""


def align_scale_shift(prediction: Array, target: Array, valid: Array | None = None) -> Array:
    """`scale * prediction + shift` per image, with the least squares fit to the target's valid pixels.

    For networks that predict depth up to scale and shift. Predicted disparity must be aligned to 1 / target, and
    inverted afterwards.

    Raises:
        DepthShapeError, NoValidPixelsError: an image has fewer than 2 valid pixels.
        DepthError: a valid pixel is not finite.
    """
    return _fitted(prediction, target, valid, _scale_shift, least=2)


def align_scale(prediction: Array, target: Array, valid: Array | None = None) -> Array:
    """`scale * prediction` per image, with the least squares fit to the target's valid pixels; errors as above, from 1
    pixel on."""
    return _fitted(prediction, target, valid, _scale, least=1)


def align_median(prediction: Array, target: Array, valid: Array | None = None) -> Array:
    """`scale * prediction` per image, with the ratio of the medians over the target's valid pixels; errors as above.

    Raises:
        DepthError: a prediction's median is not above 0 either.

    Source: Zhou et al., "Unsupervised Learning of Depth and Ego-Motion from Video", CVPR 2017, arXiv:1704.07813.
    """
    return _fitted(prediction, target, valid, _median, least=1)


def align_none(prediction: Array, target: Array, valid: Array | None = None) -> Array:
    """The prediction as it is, in the target's unit."""
    return _fitted(prediction, target, valid, lambda x, y: (1.0, 0.0, 0.0), least=1)


ALIGNMENTS: Mapping[str, Callable[[Array, Array, Array | None], Array]] = MappingProxyType(
    {"scale_shift": align_scale_shift, "scale": align_scale, "median": align_median, "none": align_none}
)


def _scale_shift(x: Array, y: Array) -> Fit:
    centre, level = float(x.mean()), float(y.mean())
    spread = float(np.square(x - centre).sum())
    # A constant prediction has no structure to fit: its best fit is the target's mean.
    return float((x - centre) @ (y - level)) / spread if spread else 0.0, centre, level


def _scale(x: Array, y: Array) -> Fit:
    length = float(x @ x)
    return float(x @ y) / length if length else 0.0, 0.0, 0.0


def _median(x: Array, y: Array) -> Fit:
    middle = float(np.median(x))
    if middle <= 0:
        raise DepthError(
            f"the median of the predicted depth is {middle:g}; the ratio of medians needs one above 0. Align maps that "
            "are known up to a shift by scale_shift."
        )
    return float(np.median(y)) / middle, 0.0, 0.0


def _fitted(
    prediction: Array, target: Array, valid: Array | None, fit: Callable[[Array, Array], Fit], *, least: int
) -> Array:
    """Every image's prediction by its own fit of valid predicted to valid target pixels."""
    prediction, target, valid = _checked(prediction, target, valid, least=least)
    for name, values in (("prediction", prediction), ("target", target)):
        if not np.isfinite(values[valid]).all():
            raise DepthError(f"{name} is not finite at a valid pixel. Mask that pixel.")
    aligned = np.empty_like(prediction)
    for number, mask in enumerate(valid):
        scale, centre, level = fit(prediction[number][mask], target[number][mask])
        aligned[number] = level + scale * (prediction[number] - centre)
    return aligned


def _abs_rel(p: Array, g: Array) -> float:
    return float((np.abs(p - g) / g).mean())


def _sq_rel(p: Array, g: Array) -> float:
    return float((np.square(p - g) / g).mean())


def _rmse(p: Array, g: Array) -> float:
    return float(np.sqrt(np.square(p - g).mean()))


def _rmse_log(p: Array, g: Array) -> float:
    return float(np.sqrt(np.square(np.log(p) - np.log(g)).mean()))


def _log10(p: Array, g: Array) -> float:
    return float(np.abs(np.log10(p) - np.log10(g)).mean())


def _silog(p: Array, g: Array) -> float:
    return float(100 * (np.log(p) - np.log(g)).std())


def _delta(power: int) -> Callable[[Array, Array], float]:
    return lambda p, g: float((np.maximum(p / g, g / p) < DELTA_BASE**power).mean())


METRICS: Mapping[str, Callable[[Array, Array], float]] = MappingProxyType(
    {
        "abs_rel": _abs_rel,
        "sq_rel": _sq_rel,
        "rmse": _rmse,
        "rmse_log": _rmse_log,
        "log10": _log10,
        "silog": _silog,
        "delta1": _delta(1),
        "delta2": _delta(2),
        "delta3": _delta(3),
    }
)
"""Metrics of one image's valid pixels, by name. rmse and sq_rel are in the target's unit; silog is 100 times the
standard deviation of the log error (as in KITTI; scale-invariant); deltas are shares of pixels, where higher is
better."""


def depth_metrics(
    prediction: Array,
    target: Array,
    valid: Array | None = None,
    *,
    floor: float | None = None,
    ceiling: float | None = None,
) -> dict[str, Array]:
    """Every metric of `METRICS`, float64 [n] each.

    Args:
        floor: smallest depth; predictions below it are raised to it, as published evaluations do after an alignment
            (1e-3 m). None refuses them.
        ceiling: largest depth; predictions above it are lowered to it, as where a data set's depth is capped.

    Raises:
        DepthShapeError, NoValidPixelsError: as named.
        NonPositiveDepthError: a valid depth is not finite or not above 0.
    """
    prediction, target, valid = _checked(prediction, target, valid, least=1)
    if floor is not None:
        prediction = np.maximum(prediction, floor)
    if ceiling is not None:
        prediction = np.minimum(prediction, ceiling)
    for name, values in (("prediction", prediction), ("target", target)):
        wrong = valid & ~(np.isfinite(values) & (values > 0))
        if wrong.any():
            image, row, column = (int(index) for index in np.argwhere(wrong)[0])
            raise NonPositiveDepthError(
                f"{name} is {values[image, row, column]} at the valid pixel ({row}, {column}) of image {image}; a "
                f"depth must be above 0. Mask it{', or give a floor' if name == 'prediction' else ''}."
            )
    pixels = [(prediction[number][mask], target[number][mask]) for number, mask in enumerate(valid)]
    return {name: np.array([error(p, g) for p, g in pixels]) for name, error in METRICS.items()}


def _checked(prediction: Array, target: Array, valid: Array | None, *, least: int) -> tuple[Array, Array, Array]:
    prediction, target = np.asarray(prediction, np.float64), np.asarray(target, np.float64)
    valid = np.ones(target.shape, bool) if valid is None else np.asarray(valid)
    if prediction.ndim != 3 or not prediction.shape == target.shape == valid.shape:
        raise DepthShapeError(
            f"prediction {prediction.shape}, target {target.shape} and valid {valid.shape} must all be the same "
            "[n, height, width]. Resize one to the other first."
        )
    if valid.dtype != bool:
        raise DepthShapeError(f"valid has the type {valid.dtype}; it must be bool. Compare, e.g. `target > 0`.")
    counts = valid.sum((1, 2))
    if not len(counts) or counts.min() < least:
        number = int(counts.argmin()) if len(counts) else 0
        raise NoValidPixelsError(
            f"image {number} has {counts.min() if len(counts) else 0} valid pixels, needs {least}. Leave it out."
        )
    return prediction, target, valid
