"""Tensors that pass between workers: whole on one and in stretches on all, or whole on one and then on all.

Every element goes from a worker that has it to one that needs it. All tensors are fp32 and flattened, and keep their
bits. Where a function says so, every worker must call it, with the same spreads in the same order, and exhaust it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from d2f_core.train.group import Device, rank_and_count
from d2f_core.train.memory import TOGETHER

T = TypeVar("T")


class Spread(NamedTuple):
    """Where the elements of one flattened tensor are."""

    owner: int
    """The worker that has it whole, or is to get it whole."""
    starts: np.ndarray
    """int64 [workers]: the first element of each worker's stretch."""
    counts: np.ndarray
    """int64 [workers]: the elements of each worker's stretch; 0 for none."""

    @property
    def load(self) -> np.ndarray:
        """Elements that each worker sends or receives for it, [workers]."""
        load = self.counts.copy()
        load[self.owner] = self.counts.sum()
        return load


def evenly(owner: int, size: int, workers: int) -> Spread:
    """A tensor of `size` elements cut into equal stretches, of which the last ones may be shorter or empty."""
    each = -(-size // workers)
    starts = np.minimum(each * np.arange(workers), size)
    return Spread(owner, starts, np.minimum(size - starts, each))


def in_batches(items: Iterable[T], load: Callable[[T], np.ndarray]) -> Iterator[list[T]]:
    """The items to exchange at a time: no worker's load exceeds `TOGETHER` elements, or that of one item.

    The latency of a collective exceeds the transfer of a small tensor, and an adapter has thousands of them.

    Args:
        load: elements on each worker, for an item.
    """
    batch: list[T] = []
    total = np.zeros(1, np.int64)
    for item in items:
        more = load(item)
        if batch and (total + more).max() > TOGETHER:
            yield batch
            batch, total = [], np.zeros(1, np.int64)
        batch.append(item)
        total = total + more
    if batch:
        yield batch


def interleaved(count: int, workers: int) -> list[int]:
    """The numbers 0 to `count` - 1 in an order in which those that follow each other are far apart.

    Neighbouring parameters lie in one worker's share: exchanged in their order, one worker would send at a time, and
    the others wait. Nor do neighbours of the order have the same remainder by `workers`, which tells who owns what.
    """
    step = -(-count // workers)
    while math.gcd(step, workers) > 1:
        step += 1
    return [number for first in range(min(step, count)) for number in range(first, count, step)]


def gather(spreads: Sequence[Spread], stretches: Sequence[Tensor], device: Device) -> Iterator[tuple[int, Tensor]]:
    """(index, whole tensor) of each tensor that this worker owns, from the stretches of all; a collective.

    Args:
        stretches: this worker's own, one per tensor.
    """
    rank, _ = rank_and_count()
    owners, counts = _table(spreads)
    order = np.argsort(owners, kind="stable")
    mine = torch.cat([stretches[index].to(device) for index in order])
    owned = np.flatnonzero(owners == rank)
    received = _swap(mine, _per_owner(owners, counts[:, rank]), counts[owned].sum(axis=0))
    del mine
    pieces = received.split(counts[owned].T.ravel().tolist())
    for place, index in enumerate(owned.tolist()):
        yield index, torch.cat(pieces[place :: len(owned)])


def scatter(spreads: Sequence[Spread], read: Callable[[int], Tensor], device: Device) -> Iterator[tuple[int, Tensor]]:
    """(index, this worker's stretch) of every tensor, from the workers that own them; a collective.

    Args:
        read: index -> a tensor that this worker owns; it must not raise, or the others would wait in vain.
    """
    rank, _ = rank_and_count()
    owners, counts = _table(spreads)
    owned = np.flatnonzero(owners == rank)
    sizes = counts[owned].T  # [workers, tensors of this worker]
    ends = sizes.ravel().cumsum().reshape(sizes.shape)
    mine = torch.empty(int(sizes.sum()))
    for place, index in enumerate(owned.tolist()):
        whole = read(index).reshape(-1)
        for target in np.flatnonzero(sizes[:, place]).tolist():
            start, count, end = spreads[index].starts[target], sizes[target, place], ends[target, place]
            mine[end - count : end] = whole[start : start + count]
        del whole
    received = _swap(mine.to(device), sizes.sum(axis=1), _per_owner(owners, counts[:, rank]))
    order = np.argsort(owners, kind="stable")
    yield from zip(order.tolist(), received.split(counts[order, rank].tolist()), strict=True)


def to_all(
    owners: Sequence[int], sizes: Sequence[int], read: Callable[[int], Tensor], device: Device
) -> Iterator[tuple[int, Tensor]]:
    """(index, whole tensor) of every tensor, from the workers that own them; a collective.

    The owners give each worker an equal stretch, and all then collect the stretches: no worker sends a tensor twice,
    however few workers own all.

    Args:
        read: as for `scatter`.
    """
    _, workers = rank_and_count()
    if workers == 1:
        yield from ((index, read(index).reshape(-1).to(device)) for index in range(len(sizes)))
        return
    spreads = [evenly(owner, size, workers) for owner, size in zip(owners, sizes, strict=True)]
    each = [-(-size // workers) for size in sizes]
    mine = torch.zeros(sum(each), device=device)
    places = mine.split(each)
    for index, stretch in scatter(spreads, read, device):
        places[index][: len(stretch)] = stretch
    everything = torch.empty(workers * len(mine), device=device)
    dist.all_gather_into_tensor(everything, mine)
    columns = everything.view(workers, -1).split(each, dim=1)
    yield from (
        (index, column.flatten()[:size]) for index, (column, size) in enumerate(zip(columns, sizes, strict=True))
    )


def _table(spreads: Sequence[Spread]) -> tuple[np.ndarray, np.ndarray]:
    """Owners, int64 [tensors], and everyone's counts, int64 [tensors, workers]."""
    return np.array([spread.owner for spread in spreads]), np.stack([spread.counts for spread in spreads])


def _per_owner(owners: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The sum of the counts of each owner's tensors, int64 [workers]."""
    _, workers = rank_and_count()
    return np.bincount(owners, weights=counts, minlength=workers).astype(np.int64)


def _swap(mine: Tensor, sent: np.ndarray, expected: np.ndarray) -> Tensor:
    """What the others send to this worker, by rank.

    Args:
        mine: elements for worker 0, then those for worker 1, and so on.
        sent: how many for each.
        expected: how many come from each.
    """
    if rank_and_count()[1] == 1:
        return mine
    received = torch.empty(int(expected.sum()), device=mine.device)
    dist.all_to_all_single(received, mine, expected.tolist(), sent.tolist())
    return received
