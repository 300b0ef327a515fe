"""Pose alignment: the source is matched as it is or mirrored, whichever is nearer to the target.

It uses labels: in the mirrored source a left eye looks like a right one, so that each keypoint is asked for at the
place of its flip partner. Without the partners it could not be done.

Source: Zhang et al., 2024, arXiv:2311.17034.
"""

import numpy as np
import torch
from torch import Tensor

from d2f_core.correspondence.evaluate.measure import both
from d2f_core.correspondence.matcher import Embedded, Matcher
from d2f_core.correspondence.matching import mutual_distance, similarity
from d2f_core.data.sources.pair_sample import NO_PARTNER, PairSample

LABELS = "flip partners of keypoints, and where the partners lie in the source"


def distance(source: Embedded, target: Embedded) -> float:
    """How far two images' features lie apart, over tokens that are each other's nearest."""
    cosines = similarity(source.features.float()[None], target.features.float()[None])
    return float(mutual_distance(cosines)[0])


def mirrored_points(pair: PairSample) -> tuple[Tensor, Tensor]:
    """Where the visible keypoints of a pair are asked for in its mirrored source, float32 [points, 2], and for which
    that is known, bool [points]: not for one whose partner is not marked in the source."""
    source = both(pair)[0]
    own = np.flatnonzero(pair.visible)
    asked = np.where(pair.flip[own] == NO_PARTNER, own, pair.flip[own])
    places = torch.from_numpy(source.keypoints[asked])
    return torch.stack([source.size[0] - places[:, 0], places[:, 1]], dim=1), ~places.isnan().any(dim=1)


def answer_mirrored(
    matcher: Matcher, pair: PairSample, mirrored: Embedded, target: Embedded, plain: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Positions [points, 2] and confidences [points] from the mirrored source, or those of `plain` where it does not
    tell."""
    points, known = mirrored_points(pair)
    positions, confidence = (each.clone() for each in plain)
    if bool(known.any()):
        positions[known], confidence[known] = matcher.match(mirrored, target, points[known])
    return positions, confidence
