"""Predicts the keypoints of pairs of images, and gathers what every protocol scores.

No map of features is ever enlarged to an image's own size, so a pair takes little more memory than the network itself.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2f_core.correspondence import pck
from d2f_core.correspondence.evaluate.config import EvaluateMatchesError
from d2f_core.correspondence.evaluate.view_pairs import EDGES
from d2f_core.correspondence.matcher import Embedded, Matcher
from d2f_core.data.image_rules import MAX_PIXELS_LIMIT, ImageRules
from d2f_core.data.images import BadImageError, decode_image
from d2f_core.data.sources.pair_sample import NO_PARTNER, PairImage, PairSample

RULES = ImageRules(resolution=1, min_side=1, max_pixels=MAX_PIXELS_LIMIT)
"""Every image that can be decoded is matched, at any size."""
KEPT_IMAGES = 256
"""Embedded images that are kept for the pairs that follow."""

Predict = Callable[[PairSample, Tensor], tuple[Tensor, Tensor]]
"""(pair, points [points, 2] of its source) -> positions [points, 2] in its target, and a confidence [points]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """The points of many pairs; all places in pixels of the original target images."""

    matches: pck.Matches
    confidence: Tensor
    """[points]"""
    partner: Tensor
    """[points, 2]: where the point's flip partner is in the target; NaN when there is none."""
    keypoint: Tensor
    """int64 [points]: number of the point in its pair."""
    pair_ids: tuple[str, ...]
    categories: tuple[str, ...]
    """Names, by the numbers in `matches.category`."""
    viewpoint: Tensor
    """[pairs]: angle between the views in degrees; NaN where it is not known."""


Kept = OrderedDict[str, Embedded]
"""Embedded images by id, the last used last."""


def predict_by(matcher: Matcher, kept: Kept | None = None) -> Predict:
    """Predictions of a matcher, which embeds each image once as long as it is among the last `KEPT_IMAGES`.

    Args:
        kept: shared by matchers that differ in their decoding alone.
    """
    kept = OrderedDict() if kept is None else kept

    def embedded(image: PairImage) -> Embedded:
        if image.image_id not in kept:
            (kept[image.image_id],) = matcher.embed([read_image(image)])
        kept.move_to_end(image.image_id)
        if len(kept) > KEPT_IMAGES:
            kept.popitem(last=False)
        return kept[image.image_id]

    def predict(pair: PairSample, points: Tensor) -> tuple[Tensor, Tensor]:
        source, target = (embedded(image) for image in both(pair))
        return matcher.match(source, target, points)

    return predict


def read_image(image: PairImage) -> np.ndarray:
    """The decoded image, uint8 [h, w, 3].

    Raises:
        EvaluateMatchesError: it is damaged, or of another size than its keypoints were marked in.
    """
    place = image.uri or image.image_id
    try:
        decoded = decode_image(image.read(), RULES)
    except BadImageError as error:
        raise EvaluateMatchesError(f"{place!r}: {error}. Mend the file, or leave its pairs out.") from None
    if decoded.size != tuple(image.size):
        raise EvaluateMatchesError(f"{place!r} is {decoded.size}, its pairs say {tuple(image.size)}. Mark it again.")
    return np.asarray(decoded)


def both(pair: PairSample) -> tuple[PairImage, PairImage]:
    """Source and target of a pair without a problem."""
    assert pair.source is not None and pair.target is not None, pair.problem
    return pair.source, pair.target


def measure(predict: Predict, pairs: Iterable[PairSample]) -> Measured:
    """Predict the visible keypoints of all pairs.

    Raises:
        ValueError: no pair has a visible keypoint.
    """
    used = [pair for pair in pairs if pair.visible.any()]
    if not used:
        raise ValueError("No pair has a keypoint that is visible in both images. Check the source of pairs.")
    names = sorted({pair.category for pair in used})
    points = [_points(predict, pair) for pair in used]
    gathered = {name: torch.cat([each[name] for each in points]) for name in points[0]}
    targets = [both(pair)[1] for pair in used]
    matches = pck.Matches(
        predicted=gathered["predicted"],
        truth=gathered["truth"],
        pair=torch.arange(len(used)).repeat_interleave(torch.tensor([len(each["truth"]) for each in points])),
        size=torch.tensor([target.size for target in targets], dtype=torch.float64),
        box=torch.tensor([target.box for target in targets], dtype=torch.float64),
        category=torch.tensor([names.index(pair.category) for pair in used]),
    )
    return Measured(
        matches=matches,
        confidence=gathered["confidence"],
        partner=gathered["partner"],
        keypoint=gathered["keypoint"],
        pair_ids=tuple(str(pair.pair_id) for pair in used),
        categories=tuple(names),
        viewpoint=torch.tensor([np.nan if pair.viewpoint is None else pair.viewpoint for pair in used]),
    )


def _points(predict: Predict, pair: PairSample) -> dict[str, Tensor]:
    """The visible points of a pair, [points, ...] each."""
    source, target = both(pair)
    seen = np.flatnonzero(pair.visible)
    found, confidence = predict(pair, torch.from_numpy(source.keypoints[seen]))
    partners = pair.flip[seen]
    places = np.where((partners != NO_PARTNER)[:, None], target.keypoints[partners], np.nan)
    return {
        "predicted": found.double(),
        "truth": torch.from_numpy(target.keypoints[seen]).double(),
        "confidence": confidence.float(),
        "partner": torch.from_numpy(places).double(),
        "keypoint": torch.from_numpy(seen),
    }


def floors(seed: int = 0) -> dict[str, Predict]:
    """Predictions without a look at the images, by name: what a matcher must beat."""
    draw = np.random.default_rng(seed)

    def rows(values: Any, count: int) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).expand(count, -1)

    def random(pair: PairSample, points: Tensor) -> Tensor:
        box = rows(both(pair)[1].box, len(points))
        return pck.random_in_box(box, torch.from_numpy(draw.random((len(points), 2))))

    def same_pixel(pair: PairSample, points: Tensor) -> Tensor:
        source, target = both(pair)
        return pck.same_pixel(points.double(), rows(source.size, len(points)), rows(target.size, len(points)))

    def box_copy(pair: PairSample, points: Tensor) -> Tensor:
        source, target = both(pair)
        return pck.box_copy(points.double(), rows(source.box, len(points)), rows(target.box, len(points)))

    def sure(guess: Callable[[PairSample, Tensor], Tensor]) -> Predict:
        return lambda pair, points: (guess(pair, points), torch.ones(len(points)))

    return {"random": sure(random), "same pixel": sure(same_pixel), "box copy": sure(box_copy)}


def by_viewpoint(measured: Measured, edges: Sequence[float] = EDGES) -> Iterator[tuple[str, Tensor]]:
    """Names of ranges of the angle between views, such as `30-60`, and which pairs fall in each, bool [pairs].

    A range holds its lower edge, the last one both; pairs whose angle is not known are in none.
    """
    last = len(edges) - 2
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        within = (measured.viewpoint >= low) & (measured.viewpoint < high)
        if number == last:
            within |= measured.viewpoint == high
        yield f"{low:g}-{high:g}", within
