"""Errors of predicted against true depth: per image, of baselines without a model, and with confidence intervals."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image

from d2f_core.data.depth import crop_and_resize
from d2f_core.evaluation.bootstrap import bootstrap_blocks
from d2f_core.evaluation.estimates import Estimate, Metric
from d2f_core.flow.depth.config import FLOORS
from d2f_core.flow.depth.metrics import ALIGNMENTS, DELTA_BASE, align_scale_shift, depth_metrics
from d2f_core.flow.depth.protocol import Protocol

Array = np.ndarray
TITLES: Mapping[str, str] = MappingProxyType(
    {
        "abs_rel": "AbsRel", "sq_rel": "SqRel (m)", "rmse": "RMSE (m)", "rmse_log": "RMSE log", "log10": "log10",
        "silog": "SILog", **{f"delta{power}": f"delta < {DELTA_BASE}^{power}" for power in (1, 2, 3)},
    }
)  # fmt: skip
RESAMPLING_SEED = 3


def square(values: Array) -> Array:
    """The centre square of a map [height, width], or of an image [height, width, channels], as images are cropped."""
    height, width = values.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return values[top : top + side, left : left + side]


def resized(prediction: Array, shape: tuple[int, int]) -> Array:
    """A map [height, width] at another size, bilinearly."""
    if prediction.shape == shape:
        return prediction
    image = Image.fromarray(np.ascontiguousarray(prediction, np.float32))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def counted(truth: Array, protocol: Protocol) -> Array:
    """True depth [height, width] with NaN where it does not count; its centre square where only that is compared."""
    inside = np.zeros(truth.shape, bool)
    inside[protocol.window(*truth.shape)] = True
    inside &= truth > protocol.min_depth  # False where it is NaN
    if protocol.max_depth is not None:
        inside &= truth < protocol.max_depth
    kept = np.where(inside, truth, np.float32(np.nan))
    return square(kept) if protocol.square else kept


def placed(prediction: Array, shape: tuple[int, int], *, of_square: bool, protocol: Protocol) -> Array:
    """A map of the whole image, or of its centre square, at the size of what `counted` keeps of a truth.

    Args:
        shape: height and width of the whole truth.
    """
    if of_square:
        return resized(prediction, (min(shape), min(shape)))
    whole = resized(prediction, shape)
    return square(whole) if protocol.square else whole


def aligned(prediction: Array, truth: Array, protocol: Protocol | None = None) -> Array:
    """The prediction resized to the truth and fitted to it: metres [height, width].

    Args:
        truth: metres, NaN where depth is unknown or does not count.
    """
    valid = np.isfinite(truth)
    align = ALIGNMENTS[(protocol or Protocol()).alignment]
    return align(resized(prediction, truth.shape)[None], truth[None], valid[None])[0]


def depth_errors(prediction: Array, truth: Array, protocol: Protocol | None = None) -> dict[str, float]:
    """Every error of one image, after the fit, which may leave the range of depths; arguments as for `aligned`."""
    protocol = protocol or Protocol()
    valid, fitted = np.isfinite(truth), aligned(prediction, truth, protocol)
    found = depth_metrics(
        fitted[None], truth[None], valid[None], floor=protocol.min_depth, ceiling=protocol.max_depth
    )  # fmt: skip
    return {name: float(values[0]) for name, values in found.items()}


def depth_sums(truths: Iterable[Array], size: int, *, squares: bool) -> Array:
    """Pixel-wise sum and count of true maps, float64 [2, size, size]; those of several sets of maps can be added.

    Args:
        squares: of their centre squares; otherwise of whole maps, each stretched to the square of `size`.
    """
    sums = np.zeros((2, size, size))
    for truth in truths:
        kept = square(truth) if squares else truth
        values = crop_and_resize(kept, (0, 0, kept.shape[1], kept.shape[0]), size)
        sums += np.nan_to_num(values), np.isfinite(values)
    return sums


def mean_depth(sums: Array) -> Array:
    """Pixel-wise mean [size, size] of what `depth_sums` has summed; pixels without any depth get the mean of all."""
    total, count = sums
    return np.where(count, total / np.maximum(count, 1), total.sum() / max(count.sum(), 1)).astype(np.float32)


def floor_maps(mean: Array) -> dict[str, Array]:
    """Baseline maps that do not depend on the image, by name, in metres; each is fitted like a prediction."""
    size = len(mean)
    ramp = np.repeat(np.linspace(1, 0, size, dtype=np.float32)[:, None], size, axis=1)
    ramp = align_scale_shift(ramp[None], mean[None])[0].astype(np.float32)
    return dict(zip(FLOORS, (np.full_like(mean, mean.mean()), ramp, mean), strict=True))


def estimate_metric(name: str, values: Mapping[str, Mapping[int, Array]], *, replicates: int = 200) -> Metric:
    """Means over images with 95 % intervals, by role and number of network evaluations (0 for floors).

    Args:
        values: the metric of each image, by role and number of evaluations; all for the same images.
    """
    places = [(role, count) for role, by_count in values.items() for count in by_count]
    found = mean_estimates(np.stack([values[role][count] for role, count in places]), replicates=replicates)
    estimates: dict[str, dict[int, Estimate]] = {role: {} for role in values}
    for (role, count), each in zip(places, found, strict=True):
        estimates[role][count] = each
    return Metric(name=name, title=TITLES[name], higher_is_better=higher_is_better(name), values=estimates)


def higher_is_better(name: str) -> bool:
    return name.startswith("delta")


def mean_estimates(values: Array, *, replicates: int) -> list[Estimate]:
    """The mean of each row of values [rows, images] with its interval; all share their draws of images."""
    images = values.shape[1]
    means = [draws @ values.T / images for draws in bootstrap_blocks(images, replicates, RESAMPLING_SEED)]
    by_row = np.concatenate(means).T
    return [
        Estimate.of(float(row.mean()), np.ascontiguousarray(drawn), images)
        for row, drawn in zip(values, by_row, strict=True)
    ]
