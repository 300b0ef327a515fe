"""Clusters of images that look alike, from their partners: each image in exactly one, none below a given size."""

from collections.abc import Sequence

import numpy as np

from d2f_core.correspondence.mine.config import MineError
from d2f_core.correspondence.pairs import NOBODY, Partners


def clusters_of(partners: Partners, ids: Sequence[str], size: int) -> np.ndarray:
    """The cluster of each image, int64 [images], numbered by the image that each was begun with, closest first.

    Greedy: images are looked at in the order of the mean cosine with their `size - 1` nearest partners, the largest
    first, of equals the one with the smaller id. One that is in no cluster begins one with its `size - 1` most similar
    partners that are in none either, if it has so many. Then each image that is left joins the cluster of its most
    similar partner that is in one: there is such a partner, or it would have begun a cluster itself. So every cluster
    has at least `size` images, and the same partners give the same clusters.

    Args:
        partners: of all images, at least `size - 1` of each.

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
    cluster = np.full(len(ids), NOBODY)
    closeness = partners.cosines[:, : size - 1].mean(1)
    number = 0
    for image in np.lexsort((np.asarray(ids), -closeness)).tolist():
        free = [other for other in partners.rows[image].tolist() if other != NOBODY and cluster[other] == NOBODY]
        if cluster[image] == NOBODY and len(free) >= size - 1:
            cluster[[image, *free[: size - 1]]] = number
            number += 1
    begun = cluster.copy()
    for image in np.flatnonzero(begun == NOBODY).tolist():
        cluster[image] = next(begun[other] for other in partners.rows[image].tolist() if begun[other] != NOBODY)
    return cluster
