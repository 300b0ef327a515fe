"""PCK, the percentage of correct keypoints: how many predicted points lie near enough to the true ones.

A prediction is correct when its error, the distance to the true point divided by a reference length, is within `alpha`.
The length is the longer side of the target object's box, or of the image. Points are (x, y) in pixels of the original
target image, of which the first one's centre is (0.5, 0.5); each protocol moves points and lengths into the frame in
which it measures. Codes that count in pixel indices miss 0.5 in every coordinate: added to the truth and to the
prediction, it leaves their distances alone.

`PROTOCOLS` keeps apart how a prediction is made, which a score presupposes and cannot see, and how it is scored.

Sources: PCK, Yang and Ramanan, 2013, doi:10.1109/TPAMI.2012.261; the box as its length, Min et al., 2019,
arXiv:1908.10543; the protocols' rules as their authors' code has them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

Frame = Literal["original", "padded_square", "stretched_square"]
"""`original`: the image as it is. `padded_square`: its longer side fills the square, and it is centred along the other.
`stretched_square`: both sides fill the square."""
Average = Literal["point", "image", "category"]

ALPHAS = (0.1, 0.05, 0.01)
SMALLEST_SIDE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How a protocol makes a prediction. None where it leaves the choice to the model."""

    frame: Frame | None
    """In which the images are given to the network."""
    side: int | None
    """Of that square, in pixels."""
    grid: int | Literal["pixels"] | None
    """Cells to a side of the target to which its features are enlarged; `pixels`: all of the original image's."""
    query: Literal["exact", "cell"]
    """The source's feature at the point itself, or that of the cell of `grid` that holds it."""
    window: int | None
    """Cells to each side of the most similar one over which a soft-argmax runs; 0: that cell's centre."""
    temperature: float | None = None
    """Of the soft-argmax."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a protocol judges a prediction."""

    frame: Frame = "original"
    side: int = 0
    """Of the square frames, in pixels."""
    length: Literal["box", "image"] = "box"
    """What alpha multiplies: the longer side of the target's box, or that of the frame."""
    strict: bool = False
    """Whether an error of exactly alpha is wrong (`<`) or correct (`<=`)."""
    averages: tuple[Average, ...] = ("point",)
    """Under which its authors publish figures."""

    def __post_init__(self) -> None:
        if (self.frame == "original") == (self.side > 0):
            raise ValueError(f"side={self.side} with frame={self.frame!r}: a square has a side, `original` has none.")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    prediction: Prediction
    scoring: Scoring


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        # This project's: nothing is rounded on the way, and an image's shape does not change a score.
        "original": Protocol(
            prediction=Prediction(frame=None, side=None, grid=None, query="exact", window=None),
            scoring=Scoring(averages=("point", "image", "category")),
        ),
        # Tang et al., 2023, arXiv:2306.03881.
        "dift": Protocol(
            prediction=Prediction(frame="stretched_square", side=768, grid="pixels", query="cell", window=0),
            scoring=Scoring(averages=("image", "point")),
        ),
        # Zhang et al., 2024, arXiv:2311.17034.
        "geoaware_padded": Protocol(
            prediction=Prediction(frame="padded_square", side=840, grid=60, query="cell", window=5, temperature=0.02),
            scoring=Scoring(frame="padded_square", side=840, strict=True, averages=("image", "point")),
        ),
        # The code published with Fundel et al., 2025, arXiv:2412.03512. The box's longer side is scaled as heights are
        # though widths are scaled otherwise, so that in a landscape image errors along x count less.
        "reference_b": Protocol(
            prediction=Prediction(
                frame="stretched_square", side=434, grid=60, query="cell", window=5, temperature=0.02
            ),
            scoring=Scoring(frame="stretched_square", side=840, strict=True, averages=("point",)),
        ),
    }
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Matches:
    """Predicted and true points of many pairs of images, all in pixels of the original target images.

    Raises:
        ValueError: shapes that do not fit, a number that is not finite, a box or an image without extent, a pair that
            is not among the pairs, a true point outside its image.
    """

    predicted: Tensor
    """[points, 2]"""
    truth: Tensor
    """[points, 2]"""
    pair: Tensor
    """int64 [points]: the row of `size`, `box` and `category` that a point belongs to."""
    size: Tensor
    """[pairs, 2]: width and height of the target image."""
    box: Tensor
    """[pairs, 4]: x, y, width and height of the object in the target image."""
    category: Tensor
    """int64 [pairs]: numbers from 0 on."""

    def __post_init__(self) -> None:
        points, pairs = len(self.pair), len(self.size)
        wanted = {"predicted": (points, 2), "truth": (points, 2), "size": (pairs, 2), "box": (pairs, 4)}
        for name, shape in (wanted | {"pair": (points,), "category": (pairs,)}).items():
            values = getattr(self, name)
            if tuple(values.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(values.shape)}, it should be {shape}. Give one row each.")
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{name} holds a number that is not finite. Leave that point out, or count it wrong.")
        if not bool((torch.cat([self.size, self.box[:, 2:]], 1) > SMALLEST_SIDE).all()):
            raise ValueError("An image or a box has no width or height, and so no length for alpha. Leave it out.")
        if points and not 0 <= int(self.pair.min()) <= int(self.pair.max()) < pairs:
            raise ValueError(f"pair goes from {self.pair.min()} to {self.pair.max()}, there are {pairs} pairs.")
        if pairs and int(self.category.min()) < 0:
            raise ValueError(f"category holds {self.category.min()}. Number the categories from 0 on.")
        outside = ((self.truth < 0) | (self.truth > self.size[self.pair])).any(1)
        if bool(outside.any()):
            place = self.truth[outside][0].tolist()
            raise ValueError(f"A true point lies at {place}, outside its image. Leave out padding.")


def placement(size: Tensor, frame: Frame, side: int = 0) -> tuple[Tensor, Tensor]:
    """Scale and offset, both float64 [images, 2]: `point * scale + offset` is a point of an image in the frame.

    Args:
        size: [images, 2], width and height in pixels.
    """
    size = size.double()
    if frame == "original":
        return torch.ones_like(size), torch.zeros_like(size)
    if frame == "stretched_square":
        return side / size, torch.zeros_like(size)
    scale = (side / size.amax(1, keepdim=True)).expand_as(size)
    # Whole pixels, as images are resized and pasted.
    return scale, ((side - (size * scale).round()) / 2).floor()


def to_frame(points: Tensor, size: Tensor, frame: Frame, side: int = 0) -> Tensor:
    """Points [points, 2] of images of these sizes [points, 2] in a frame, float64 [points, 2]."""
    scale, offset = placement(size, frame, side)
    return points.double() * scale + offset


def lengths(size: Tensor, box: Tensor, scoring: Scoring) -> Tensor:
    """The reference length of each target, float64 [pairs], in pixels of the scoring's frame.

    Box sides are scaled as heights are, which only the stretched square tells from widths.
    """
    if scoring.length == "image":
        longest = size.double().amax(1)
        return longest if scoring.frame == "original" else torch.full_like(longest, scoring.side)
    scale, _ = placement(size, scoring.frame, scoring.side)
    return box[:, 2:].double().amax(1) * scale[:, 1]


def errors(matches: Matches, scoring: Scoring, *, to: Tensor | None = None) -> Tensor:
    """Distance of each prediction from the truth in units of the reference length, float64 [points].

    Divided rather than compared with alpha times the length: 30 px of 300 are 0.1 in floating point too, whereas
    0.1 * 300 is a little above 30.

    Args:
        to: other places [points, 2] to measure from, in place of the truth.
    """
    size = matches.size[matches.pair]
    there = matches.truth if to is None else to
    predicted, there = (to_frame(points, size, scoring.frame, scoring.side) for points in (matches.predicted, there))
    return (predicted - there).norm(dim=1) / lengths(matches.size, matches.box, scoring)[matches.pair]


def within(error: Tensor, alphas: Sequence[float], scoring: Scoring) -> Tensor:
    """Which errors [points] count as correct at each alpha, bool [points, alphas].

    Raises:
        ValueError: an alpha that is not above 0 and at most 1.
    """
    if not alphas or any(not 0 < alpha <= 1 for alpha in alphas):
        raise ValueError(f"alphas={tuple(alphas)} must lie above 0 and at most at 1, and be at least one. Use 0.1.")
    bounds = error.new_tensor(alphas)
    return error[:, None] < bounds if scoring.strict else error[:, None] <= bounds


@dataclass(frozen=True, kw_only=True, eq=False)
class Pck:
    """PCK in [0, 1] by each way of averaging, float64 [draws, alphas]; one draw unless others were asked for."""

    alphas: tuple[float, ...]
    point: Tensor
    """Share of all points."""
    image: Tensor
    """Mean over pairs of the share of a pair's points; pairs without a point do not count."""
    category: Tensor
    """Mean over categories of the share of a category's points, so that each counts alike."""
    by_category: Tensor
    """[draws, categories, alphas]: that share; NaN in a category without a point."""

    def average(self, how: Average) -> Tensor:
        return {"point": self.point, "image": self.image, "category": self.category}[how]


def pck(matches: Matches, scoring: Scoring, alphas: Sequence[float] = ALPHAS, *, draws: Tensor | None = None) -> Pck:
    """PCK by point, by image and as a mean over categories, side by side.

    Args:
        draws: [draws, pairs], how often each pair counts: the rows of a bootstrap over images
            (`d2f_core.evaluation.bootstrap.bootstrap_counts`), of which each gets a PCK of its own. None: each once.

    Raises:
        ValueError: there is no point at all; draws of another number of pairs; alphas as in `within`.
    """
    if not len(matches.pair):
        raise ValueError("There is no point to score. Give at least one pair with a visible keypoint.")
    pairs = len(matches.size)
    drawn = torch.ones(1, pairs, dtype=torch.float64) if draws is None else draws.double()
    if drawn.ndim != 2 or drawn.shape[1] != pairs:
        raise ValueError(f"draws has shape {tuple(drawn.shape)}, there are {pairs} pairs. Give [draws, pairs].")
    correct = within(errors(matches, scoring), alphas, scoring).double()
    hits = correct.new_zeros(pairs, len(alphas)).index_add(0, matches.pair, correct)
    points = correct.new_zeros(pairs, 1).index_add(0, matches.pair, torch.ones_like(correct[:, :1]))
    by_category = _by_category(drawn, hits, points, matches.category)
    return Pck(
        alphas=tuple(alphas),
        point=drawn @ hits / (drawn @ points),
        image=drawn @ (hits / points.clamp(min=1)) / (drawn @ points.sign()),
        category=by_category.nanmean(1),
        by_category=by_category,
    )


def _by_category(drawn: Tensor, hits: Tensor, points: Tensor, category: Tensor) -> Tensor:
    belongs = torch.nn.functional.one_hot(category).to(hits.dtype)[:, :, None]
    found, there = ((drawn @ (belongs * each[:, None]).flatten(1)) for each in (hits, points))
    return found.unflatten(1, (belongs.shape[1], -1)) / there[:, :, None]


def side_confusion(matches: Matches, partner: Tensor, scoring: Scoring, alpha: float = 0.1) -> Tensor:
    """Which predictions took left for right, bool [points].

    Such a prediction is wrong, nearer to the true place of the point's flip partner (the left eye's is the right eye)
    than to its own, and within alpha of the partner's. Divide by the number of points that have a partner.

    Args:
        partner: [points, 2], where the partner is in the target image; NaN when there is none, or it is not visible.
    """
    own, other = errors(matches, scoring), errors(matches, scoring, to=partner)
    correct, near = (within(error, (alpha,), scoring)[:, 0] for error in (own, other))
    return ~correct & near  # and so nearer to the partner's; a comparison with NaN is false


def random_in_box(box: Tensor, uniform: Tensor) -> Tensor:
    """Floor: anywhere in the target's box.

    Args:
        box: [points, 4], x, y, width and height of each point's target object.
        uniform: [points, 2] in [0, 1), drawn by the caller.

    Returns:
        Points [points, 2] in pixels of the target.
    """
    return box[:, :2] + uniform * box[:, 2:]


def same_pixel(points: Tensor, source_size: Tensor, target_size: Tensor) -> Tensor:
    """Floor: the same place relative to the image. Points [points, 2] of images of these sizes [points, 2]."""
    return points / source_size * target_size


def box_copy(points: Tensor, source_box: Tensor, target_box: Tensor) -> Tensor:
    """Floor, the hardest: the same place relative to the box. Points [points, 2], boxes [points, 4]."""
    return target_box[:, :2] + (points - source_box[:, :2]) / source_box[:, 2:] * target_box[:, 2:]
