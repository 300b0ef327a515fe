"""Units of work of an evaluation: chunks of pairs that share images, and the images that are embedded together.

Both follow from the pairs and two sizes alone, whatever the number of actors, and so do the results.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d2f_core.correspondence.evaluate.measure import KEPT_IMAGES, both
from d2f_core.data.sources.pair_sample import PairImage, PairSample

TILE = KEPT_IMAGES // 2
"""Images of a block: pairs of two blocks follow one another, and an actor keeps the images of both."""

Batch = tuple[PairImage, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Pairs of one category that one actor measures."""

    numbers: tuple[int, ...]
    """Places of the pairs among all."""
    pairs: tuple[PairSample, ...]
    batches: Mapping[str, Batch]
    """By an image's key the images that go through a network with it, itself among them."""


def cut(pairs: Sequence[PairSample], *, chunk_size: int, batch_size: int) -> list[Chunk]:
    """Cut pairs into chunks of at most `chunk_size`, and their images into batches of at most `batch_size`.

    An image belongs to one batch only, of images of its category: how its numbers are rounded may depend on which
    others a network sees with it.
    """
    members = _images(pairs)
    batches = _batches(members, batch_size)
    block = {name: place // TILE for images in members.values() for place, name in enumerate(images)}
    return [
        Chunk(
            numbers=tuple(part),
            pairs=tuple(pairs[number] for number in part),
            batches={each.key: batches[each.key] for number in part for each in both(pairs[number])},
        )
        for run in _runs(pairs, block)
        for part in np.array_split(np.array(run), math.ceil(len(run) / chunk_size))
    ]


def _images(pairs: Sequence[PairSample]) -> dict[str, dict[str, PairImage]]:
    """The images by category and key, in order of appearance; one of several categories is in the first of these."""
    found: dict[str, dict[str, PairImage]] = defaultdict(dict)
    seen: set[str] = set()
    for pair in sorted(pairs, key=lambda pair: pair.category):
        for image in both(pair):
            if image.key not in seen:
                seen.add(image.key)
                found[pair.category][image.key] = image
    return found


def _batches(members: Mapping[str, Mapping[str, PairImage]], size: int) -> dict[str, Batch]:
    found = {}
    for images in members.values():
        every = tuple(images.values())
        for start in range(0, len(every), size):
            batch = every[start : start + size]
            found |= {image.key: batch for image in batch}
    return found


def _runs(pairs: Sequence[PairSample], block: Mapping[str, int]) -> list[list[int]]:
    """The places of each category's pairs, those of the same two blocks of images after one another.

    Blocks of targets are gone through forwards and backwards in turn, so that one of them is always at hand.
    """

    def place(number: int) -> tuple[int, int, int]:
        source, target = (block[image.key] for image in both(pairs[number]))
        return source, target if source % 2 == 0 else -target, number

    runs: dict[str, list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        runs[pair.category].append(number)
    return [sorted(runs[category], key=place) for category in sorted(runs)]
