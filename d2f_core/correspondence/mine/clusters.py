"""Clusters of images that look alike, from their partners: each image in exactly one, none below a given size."""

from collections.abc import Sequence

import numpy as np

from d2f_core.correspondence.mine.config import MineError
from d2f_core.correspondence.pairs import NOBODY, Partners


def clusters_of(
    partners: Partners, ids: Sequence[str], size: int, groups: Sequence[object] | None = None
) -> np.ndarray:
    """The cluster of each image, int64 [images], numbered in the order in which they were begun.

    Greedy: images are looked at in the order of the mean cosine with their `size - 1` nearest partners, the largest
    first, of equals the one with the smaller id. There are four rounds:

    1. An image that is in no cluster begins one with its `size - 1` most similar partners that are in none either, no
       two of them of one group, if it has so many.
    2. Each image that is left joins the cluster of its most similar partner in a cluster without an image of its group.
    3. As the first; but where partners of different groups are too few, those of groups that are there already follow.
    4. As the second; but where each such cluster has its group, it joins that of its most similar partner.

    So every cluster has at least `size` images, the same partners give the same clusters in whatever order the rows
    are, and images share a cluster with their group only from the third round on. Without groups the first two rounds
    place all images: whoever began no cluster has a partner in one. For the same reason the last two place the rest.

    Args:
        partners: of all images, at least `size - 1` of each.
        groups: [images], what near-duplicates share, as for `nearest_partners`. None: there are none.

    Raises:
        MineError: an image has fewer.
    """
    found = (partners.rows != NOBODY).sum(1)
    if (found < size - 1).any():
        row = int((found < size - 1).argmax())
        raise MineError(
            f"cluster_size={size} takes {size - 1} partners of each image, and {ids[row]!r} has {found[row]}. Use "
            f"cluster_size={found.min() + 1}, or more images."
        )
    closeness = partners.cosines[:, : size - 1].mean(1)
    order = np.lexsort((np.asarray(ids), -closeness)).tolist()
    clusters = _Clusters(partners, range(len(ids)) if groups is None else groups)
    for shared in (False, True):
        clusters.begin(order, size, shared=shared)
        clusters.join(order, shared=shared)
    return clusters.number


class _Clusters:
    """Clusters that grow."""

    def __init__(self, partners: Partners, groups: Sequence[object]) -> None:
        self.number = np.full(len(groups), NOBODY)
        self._partners = [[other for other in row if other != NOBODY] for row in partners.rows.tolist()]
        self._groups, self._groups_in = groups, list[set[object]]()

    def begin(self, order: Sequence[int], size: int, *, shared: bool) -> None:
        """Rounds 1 and 3: images of `order` begin clusters."""
        for image in order:
            if self.number[image] == NOBODY and (members := self._members(image, size, shared=shared)):
                self._groups_in.append(set())
                for member in members:
                    self._add(member, len(self._groups_in) - 1)

    def join(self, order: Sequence[int], *, shared: bool) -> None:
        """Rounds 2 and 4: those left join clusters, by partners that were in one before the round."""
        before = self.number.tolist()
        for image in order:
            near = [before[other] for other in self._partners[image] if before[other] != NOBODY]
            without = [number for number in near if self._groups[image] not in self._groups_in[number]]
            if self.number[image] == NOBODY and (chosen := without or (near if shared else [])):
                self._add(image, chosen[0])

    def _members(self, image: int, size: int, *, shared: bool) -> list[int]:
        """An image and the partners that it begins a cluster with; none where they are too few."""
        members, repeated, there = [image], [], {self._groups[image]}
        for other in self._partners[image]:
            if self.number[other] == NOBODY:
                (repeated if self._groups[other] in there else members).append(other)
                there.add(self._groups[other])
        found = [*members, *repeated] if shared else members
        return found[:size] if len(found) >= size else []

    def _add(self, image: int, number: int) -> None:
        self.number[image] = number
        self._groups_in[number].add(self._groups[image])
