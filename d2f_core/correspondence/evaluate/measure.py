"""Predicts the keypoints of pairs of images, and gathers what every protocol scores.

No map of features is ever enlarged to an image's own size, so a pair takes little more memory than the network itself.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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
KEPT_IMAGES = 128
"""Embedded images that are kept for the pairs that follow, and as many mirrored ones."""

Predict = Callable[[PairSample, Tensor], tuple[Tensor, Tensor]]
"""(pair, points [points, 2] of its source) -> positions [points, 2] in its target, and a confidence [points]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """The points of many pairs; all places in pixels of the original target images."""

    matches: pck.Matches
    confidence: Tensor
    """[points]; NaN where the matcher gave no answer, or a number that is not finite: such a point counts as wrong, and
    is placed out of reach of the true one."""
    partner: Tensor
    """[points, 2]: where the point's flip partner is in the target; NaN when there is none."""
    keypoint: Tensor
    """int64 [points]: number of the point in its pair."""
    pair_ids: tuple[str, ...]
    categories: tuple[str, ...]
    """Names, by the numbers in `matches.category`."""
    viewpoint: Tensor
    """[pairs]: angle between the views in degrees; NaN where it is not known."""
    flipped: Tensor
    """bool [pairs]: whose source was mirrored to be matched."""

    @property
    def missing(self) -> Tensor:
        """bool [points]: which were not answered."""
        return self.confidence.isnan()


class EmbeddedImages:
    """A matcher's features of images; an image is embedded once as long as it is among the last `KEPT_IMAGES`, and its
    mirror image among as many of these."""

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher
        self._plain: OrderedDict[str, Embedded] = OrderedDict()
        self._mirrored: OrderedDict[str, Embedded] = OrderedDict()

    def get(self, image: PairImage, batch: Sequence[PairImage] = (), *, flipped: bool = False) -> Embedded:
        """The features of an image.

        Args:
            batch: the images that are embedded with it, itself among them; it alone by default.
            flipped: of its mirror image, left and right exchanged.
        """
        kept = self._mirrored if flipped else self._plain
        if image.key not in kept:
            together = batch or (image,)
            pixels = [np.ascontiguousarray(read_image(each)[:, :: -1 if flipped else 1]) for each in together]
            kept |= zip([each.key for each in together], self._matcher.embed(pixels), strict=True)
        kept.move_to_end(image.key)
        while len(kept) > max(KEPT_IMAGES, len(batch)):
            kept.popitem(last=False)
        return kept[image.key]


def predict_by(
    matcher: Matcher, images: EmbeddedImages | None = None, batches: Mapping[str, Sequence[PairImage]] | None = None
) -> Predict:
    """Predictions of a matcher.

    Args:
        images: shared by matchers that differ in their decoding alone.
        batches: by an image's key the images that are embedded with it; each alone by default.
    """
    known, together = images or EmbeddedImages(matcher), batches or {}

    def predict(pair: PairSample, points: Tensor) -> tuple[Tensor, Tensor]:
        source, target = (known.get(image, together.get(image.key, ())) for image in both(pair))
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
    found = [predict(pair, asked_points(pair)) for pair in used]
    predicted, confidence = (torch.cat(parts) for parts in zip(*found, strict=True))
    return gather(used, predicted, confidence)


def asked_points(pair: PairSample) -> Tensor:
    """The visible keypoints of a pair in its source, float32 [points, 2]."""
    return torch.from_numpy(both(pair)[0].keypoints[pair.visible])


def gather(
    pairs: Sequence[PairSample], predicted: Tensor, confidence: Tensor, flipped: Tensor | None = None
) -> Measured:
    """The predictions of all visible keypoints of pairs, one pair after another, beside what is true; an answer with a
    number that is not finite is a missing one.

    Args:
        predicted: [points, 2].
        confidence: [points].
        flipped: bool [pairs]; none by default.
    """
    names = sorted({pair.category for pair in pairs})
    number = {name: place for place, name in enumerate(names)}
    points = [_truth(pair) for pair in pairs]
    truth, partner, keypoint = (torch.cat(parts) for parts in zip(*points, strict=True))
    targets = [both(pair)[1] for pair in pairs]
    of_point = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(each[0]) for each in points]))
    size, box = (
        torch.tensor([getattr(target, name) for target in targets], dtype=torch.float64) for name in ("size", "box")
    )
    answered = predicted.isfinite().all(dim=1) & confidence.isfinite()
    # Two lengths of the longest side below the truth: wrong in every frame, whose lengths are scaled as heights are.
    beyond = truth + torch.stack([truth.new_zeros(len(truth)), 2 * torch.cat([size, box], 1).amax(1)[of_point]], dim=1)
    matches = pck.Matches(
        predicted=predicted.double().where(answered[:, None], beyond),
        truth=truth,
        pair=of_point,
        size=size,
        box=box,
        category=torch.tensor([number[pair.category] for pair in pairs]),
    )
    return Measured(
        matches=matches,
        confidence=confidence.float().where(answered, torch.nan),
        partner=partner,
        keypoint=keypoint,
        pair_ids=tuple(str(pair.pair_id) for pair in pairs),
        categories=tuple(names),
        viewpoint=torch.tensor([np.nan if pair.viewpoint is None else pair.viewpoint for pair in pairs]),
        flipped=torch.zeros(len(pairs), dtype=torch.bool) if flipped is None else flipped,
    )


def _truth(pair: PairSample) -> tuple[Tensor, Tensor, Tensor]:
    """Of a pair's visible points: their true places [points, 2], their flip partners' [points, 2], their numbers."""
    target, seen = both(pair)[1], np.flatnonzero(pair.visible)
    partners = pair.flip[seen]
    places = np.where((partners != NO_PARTNER)[:, None], target.keypoints[partners], np.nan)
    return torch.from_numpy(target.keypoints[seen]).double(), torch.from_numpy(places).double(), torch.from_numpy(seen)


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
