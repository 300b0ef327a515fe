"""An object as it is built: its solids, and keypoints that know left from right."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d2f_core.correspondence.views.solids import Point, Solid

LEFT_RIGHT = (("left", 1), ("right", -1))
"""The object's own sides, and the sign of y there."""
FRONT_BACK = (("front", 1), ("back", -1))


@dataclass(frozen=True, kw_only=True)
class Keypoint:
    position: np.ndarray
    """Float64 [3]."""
    radius: float
    """Distance within which a surface belongs to the keypoint: that of a knee is the leg's radius there."""


Keypoints = dict[str, Keypoint]


@dataclass(frozen=True, kw_only=True)
class Shape:
    solids: Sequence[Solid]
    keypoints: Mapping[str, Keypoint]
    """By name; a category's shapes may lack some of its keypoints."""


MakeShape = Callable[[np.random.Generator], Shape]


def point(position: Point, radius: float = 0.03) -> Keypoint:
    return Keypoint(position=np.asarray(position, float), radius=radius)


def pair(name: str, left: Point, radius: float = 0.03) -> Keypoints:
    """The keypoints "left NAME" and "right NAME" of a symmetric part, by the left one."""
    position = np.asarray(left, float)
    return {f"{side} {name}": point(position * [1, sign, 1], radius) for side, sign in LEFT_RIGHT}


def flip_partner(name: str) -> str:
    """The name of what a mirror image shows where this keypoint is: left and right exchanged."""
    words = {"left": "right", "right": "left"}
    return " ".join(words.get(word, word) for word in name.split())
