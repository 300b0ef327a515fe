"""The cluster's nodes: what each has free, what fits on them, and how that is said in a line."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from d2f_core.ray_internals import HEAD, free_by_node, leaving_nodes

logger = logging.getLogger(__name__)

MEMORY = "memory"
"""Ray's name of the host's memory; in bytes."""
SCARCE = ("GPU", "CPU", MEMORY)
SHOWN_ADDRESSES = 3
"""Of nodes of one kind, in the line that says what does not fit."""


class Part(NamedTuple):
    """So many processes of one name, each of which lies whole on one node."""

    name: str
    count: int
    bundle: Mapping[str, float]
    """What each takes, by Ray's names, e.g. `{"CPU": 1, "GPU": 1}`."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A living node that was not announced to go."""

    id: str = ""
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]


def living_nodes() -> list[Node]:
    """What the nodes that stay offer, and what is free of it."""
    import ray

    free, leaving = free_by_node(), leaving_nodes()
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def without_place(parts: Sequence[Part], free: Sequence[Mapping[str, float]]) -> list[Part]:
    """What finds no node when the scarcest are placed first, each where the least is left over, as Ray packs a group.

    Args:
        free: what each node has free.
    """
    left, missing = [dict(node) for node in free], []
    for part in sorted(parts, key=lambda part: tuple(-part.bundle.get(name, 0) for name in SCARCE)):
        placed = 0
        while placed < part.count and (fitting := [node for node in left if _fits(part.bundle, node)]):
            best = min(fitting, key=lambda node: tuple(node.get(name, 0) for name in SCARCE))
            best.update({name: best.get(name, 0) - amount for name, amount in part.bundle.items()})
            placed += 1
        if placed < part.count:
            missing.append(part._replace(count=part.count - placed))
    return missing


def warn_off_head() -> None:
    """Say it when this job's driver does not run on the head."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    if any(HEAD in node["Resources"] and node["NodeID"] != here for node in ray.nodes() if node["Alive"]):
        logger.warning(
            "this job's driver does not run on the cluster's head: the actor by which Ray Data asks for nodes stays on "
            "the driver's node, and is lost to all jobs with it. `ray job submit` runs drivers on the head."
        )


def amounts(given: Mapping[str, float], names: Sequence[str]) -> str:
    """E.g. `3 CPU, 1 GPU, 12.5 GB memory`."""
    return ", ".join(_amount(given.get(name, 0), name) for name in names)


def listed(parts: Sequence[Part]) -> str:
    """E.g. `2 workers of 3 CPU, 1 GPU`."""
    return ", ".join(
        f"{_counted(part.count, part.name)} of {amounts(part.bundle, [n for n in part.bundle if part.bundle[n]])}"
        for part in parts
    )


def by_kind(nodes: Sequence[Node], names: Sequence[str]) -> str:
    """Nodes that offer and have free the same are counted, so that the line stays one on a large cluster."""
    kinds: dict[str, list[str]] = {}
    for node in nodes:
        shown = [(node.free.get(n, 0), node.total[n], n) for n in names if node.total.get(n)]
        room = ", ".join(f"{_number(free, n)} of {_amount(total, n)}" for free, total, n in shown)
        kinds.setdefault(f"with {room} free" if room else "without any", []).append(node.address)
    return "; ".join(f"{_addressed(where)} {room}" for room, where in sorted(kinds.items())) or "no node"


def _amount(value: float, name: str) -> str:
    return f"{_number(value, name)} {'GB ' * (name == MEMORY)}{name}"


def _number(value: float, name: str) -> str:
    return f"{value / 1e9:.1f}" if name == MEMORY else f"{value:g}"


def _addressed(addresses: Sequence[str]) -> str:
    shown = sorted(set(addresses))[:SHOWN_ADDRESSES]
    return f"{_counted(len(addresses), 'node')} ({', '.join(shown)}{', ...' * (len(set(addresses)) > len(shown))})"


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


def _fits(bundle: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node.get(name, 0) >= amount - 1e-6 for name, amount in bundle.items())
