"""Room on the cluster for the workers of a training and the actors of a batch job: asked for, waited for, and held.

What is asked for is a placement group. While it is pending it is a demand for an autoscaler that nothing overwrites (a
request by `request_resources` is gone as soon as Ray Data's coordinator sends its own); it fits node by node, sees what
other jobs hold, and once it is placed nobody else gets the place.
"""

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from d2f_core.nodes import (
    Node,
    Part,
    amounts,
    by_kind,
    listed,
    living_nodes,
    warn_off_head,
    without_place,
)  # fmt: skip
from d2f_core.ray_internals import starting_nodes

logger = logging.getLogger(__name__)

POLL_SECONDS = 1
"""Between two looks at the cluster; Ray takes whole seconds."""
SAY_SECONDS = 60.0
"""Between two lines of the log while room is waited for; the first comes at once."""
PLACING_SECONDS = 10.0
"""Given to Ray for placing a group that fits by what the nodes report, which is up to a second old."""
STARTING_SECONDS = 1800.0
"""How much longer than it was told to a job waits for nodes that an autoscaler has begun to start."""
HAND_OVER_SECONDS = 60.0
"""After which a place is given back even if nobody queued for it."""


class InsufficientResourcesError(ValueError):
    """The cluster cannot hold what was asked for; says what is missing and what to lower."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """How many workers or actors are wanted, and what so many take."""

    counts: Sequence[int]
    """Numbers that will do, the wanted one first, then descending."""
    parts: Callable[[int], Sequence[Part]]
    """What a number of them takes, helpers included."""
    subject: str
    """Begins the sentence about what does not fit, with `{count}` in it, e.g. `num_workers={count} needs`."""
    advice: str
    """Ends it: which flags change it."""


@dataclass(kw_only=True)
class Reservation:
    """A place that is held on the cluster until it is released, or the job ends."""

    count: int
    """How many workers or actors it is for."""
    group: Any
    """Ray's placement group; None once it is released."""

    def release(self) -> None:
        """Give the place back; again does nothing."""
        group, self.group = self.group, None
        if group is not None:
            _remove(group)


def reserve(demand: Demand, *, seconds: float, fewer_after: float) -> Reservation:
    """Wait until the cluster has room for the wanted number, or for fewer, and hold it.

    An autoscaler is asked for the wanted number all the while. Nodes that it has begun to start are waited for beyond
    `seconds`, for half an hour at most.

    Args:
        seconds: how long room for the fewest is waited for; 0: it must be there.
        fewer_after: how long room for the wanted number is waited for before the largest number that fits is taken.

    Raises:
        InsufficientResourcesError: there was no room in time; says in one line who needs what, what each node has free,
            what others hold and what is missing.
    """
    warn_off_head()
    began, wanted = time.monotonic(), demand.counts[0]
    full, said = 0.0, -SAY_SECONDS
    held = Reservation(count=wanted, group=_ask_for(demand.parts(wanted)))
    try:
        while not _is_placed(held.group, POLL_SECONDS):
            waited, nodes = time.monotonic() - began, living_nodes()
            if waited >= fewer_after and (smaller := _smaller(demand, nodes, held)):
                return smaller
            fits = not without_place(demand.parts(demand.counts[-1]), [node.free for node in nodes])
            full = full if fits else waited
            if waited >= (max(seconds, full + PLACING_SECONDS) if fits else _patience(seconds)):
                raise InsufficientResourcesError(refusal(demand, nodes, waited))
            if waited - said >= SAY_SECONDS:
                said = waited
                limit = f" of {seconds:g}" if seconds < inf else ""
                logger.warning("waiting for room, %.0f%s s: %s", waited, limit, refusal(demand, nodes, waited))
    except BaseException:
        held.release()
        raise
    return held


@contextlib.contextmanager
def handed_to_group(held: Reservation, bundles: Sequence[Mapping[str, float]]) -> Iterator[None]:
    """Give the place back as soon as another placement group of these bundles is queued, and at the latest at the end.

    Ray offers no way to let Ray Train take over a group. Were the place free before its own group is queued, any group
    that is waiting would get it. What remains of a race: a queued group is tried again at growing intervals of up to a
    second, so a fresh one comes before those that have waited longer; a task or actor that waits in a node's own queue
    comes before both. Whoever loses waits, and Ray Train gives up after a minute: reserve again then. For the tenth of
    a second in which both groups exist, an autoscaler may see the demand twice.
    """
    over = threading.Event()
    watch = threading.Thread(target=_release_when_queued, args=(held, bundles, _group_ids(), over), daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def nodes_of(group: Any, count: int) -> list[str]:
    """Ids of the nodes on which the first `count` bundles of a placed group lie."""
    places = _groups()[group.id.hex()]["bundles_to_node_id"]
    return [places[number] for number in range(count)]


def refusal(demand: Demand, nodes: Sequence[Node], waited: float) -> str:
    """The one line: who needs what, what there is on each node, what is missing where, and which flag changes it."""
    count = demand.counts[-1]
    parts = demand.parts(count)
    names = sorted({name for part in parts for name, amount in part.bundle.items() if amount})
    needed, total, free = _sum(parts), _sum_of(nodes, "total"), _sum_of(nodes, "free")
    held = {name: total.get(name, 0) - free.get(name, 0) for name in names}
    missing = without_place(parts, [node.free for node in nodes])
    lacking = f"no node has room for {listed(missing)}" if missing else "others took the room when it was there"
    return (
        f"{demand.subject.format(count=count)} {amounts(needed, names)} ({listed(parts)}), and the cluster has "
        f"{amounts(total, names)}, of which other jobs hold {amounts(held, names)}: {by_kind(nodes, names)}; "
        f"{lacking}; waited {waited:.0f} s. {demand.advice}"
    )


def _patience(seconds: float) -> float:
    """How long to wait in all, as it looks now."""
    return seconds + STARTING_SECONDS if seconds and starting_nodes() else seconds


def _smaller(demand: Demand, nodes: Sequence[Node], held: Reservation) -> Reservation | None:
    """A place for the largest number below the wanted one that fits now; `held` asks for the wanted one meanwhile."""
    free = [node.free for node in nodes]
    fitting = next((count for count in demand.counts if not without_place(demand.parts(count), free)), None)
    if fitting is None or fitting == held.count:  # then it is about to be placed
        return None
    fewer = Reservation(count=fitting, group=_ask_for(demand.parts(fitting)))
    if _is_placed(fewer.group, int(PLACING_SECONDS)):
        held.release()
        return fewer
    fewer.release()
    return None


def _ask_for(parts: Sequence[Part]) -> Any:
    from ray.util.placement_group import placement_group

    each = [(part.count, {name: amount for name, amount in part.bundle.items() if amount}) for part in parts]
    return placement_group([bundle for count, bundle in each for _ in range(count)], strategy="PACK")


def _is_placed(group: Any, seconds: int) -> bool:
    return group.wait(seconds)


def _remove(group: Any) -> None:
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(group)


def _groups() -> dict[str, Any]:
    from ray.util.placement_group import placement_group_table

    return placement_group_table()


def _release_when_queued(
    held: Reservation, bundles: Sequence[Mapping[str, float]], known: set[str], over: threading.Event
) -> None:
    deadline = time.monotonic() + HAND_OVER_SECONDS
    try:
        while not over.wait(0.1) and time.monotonic() < deadline:
            new = [group for name, group in _groups().items() if name not in known]
            if any(list(group["bundles"].values()) == list(bundles) for group in new):
                break
    finally:
        held.release()


def _group_ids() -> set[str]:
    return set(_groups())


def _sum(parts: Sequence[Part]) -> Counter[str]:
    total: Counter[Any] = Counter()
    for part in parts:
        total.update({name: part.count * amount for name, amount in part.bundle.items()})
    return total


def _sum_of(nodes: Sequence[Node], which: str) -> Counter[str]:
    total: Counter[Any] = Counter()
    for node in nodes:
        total.update(getattr(node, which))
    return total
