"""Which pictures of a table look alike, by their perceptual hashes, without comparing each with each."""

from collections.abc import Iterator

import numpy as np

from d2f_core.import_images.looks import HASH_BITS

bits_of = np.bitwise_count


def clusters(hashes: np.ndarray, distance: int) -> np.ndarray:
    """The number of each picture's cluster: the smallest row among those that it is connected with.

    Two pictures are connected if their hashes differ in at most `distance` bits, directly or over others between them.

    Args:
        hashes: uint64 [pictures].
        distance: bits; -1: no two are connected, not even equal ones.

    Returns:
        int64 [pictures].
    """
    if distance < 0:
        return np.arange(len(hashes))
    unique, first, place = np.unique(hashes, return_index=True, return_inverse=True)
    root = np.arange(len(unique))

    def find(node: int) -> int:
        while root[node] != node:
            root[node] = root[root[node]]
            node = int(root[node])
        return node

    for one, other in _close_pairs(unique, distance):
        # The one that stands first in the table leads.
        a, b = sorted((find(one), find(other)), key=lambda node: first[node])
        root[b] = a
    leaders = np.array([first[find(node)] for node in range(len(unique))], dtype=np.int64)
    return leaders[place] if len(hashes) else np.zeros(0, np.int64)


def _close_pairs(unique: np.ndarray, distance: int) -> Iterator[tuple[int, int]]:
    """Pairs of different hashes within a distance, some of them twice.

    Cut into distance + 1 bands, two such hashes agree in at least one band: only those that share a band's value are
    compared.
    """
    if distance == 0:
        return
    for start, end in _bands(distance + 1):
        values = (unique >> np.uint64(start)) & np.uint64((1 << (end - start)) - 1)
        order = np.argsort(values, kind="stable")
        edges = np.flatnonzero(np.diff(values[order])) + 1
        for group in np.split(order, edges):
            yield from _connections(unique, group, distance)


def _connections(unique: np.ndarray, group: np.ndarray, distance: int) -> Iterator[tuple[int, int]]:
    """Pairs that connect what is connected in a group. Whoever is reached leaves it, so that a burst of alike pictures
    is not compared each with each.
    """
    reached: list[int] = []
    while len(group):
        if reached:
            one = reached.pop()
        else:
            one, group = int(group[0]), group[1:]
        near = bits_of(unique[group] ^ unique[one]) <= distance
        found = group[near].tolist()
        yield from ((one, other) for other in found)
        reached += found
        group = group[~near]


def _bands(count: int) -> Iterator[tuple[int, int]]:
    edges = np.linspace(0, HASH_BITS, count + 1).round().astype(int)
    yield from zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
