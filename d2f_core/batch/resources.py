"""Waits for room for a batch job's actors on the cluster, after asking an autoscaler for it."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import ray.data

from d2f_core import ray_internals
from d2f_core.nodes import Part
from d2f_core.resources import Demand, Reservation, reserve

logger = logging.getLogger(__name__)


def await_resources(
    actors: int, each: Mapping[str, float], *, others: Mapping[str, float] | None = None, least: int = 1, seconds: float
) -> Reservation:
    """Wait until the cluster has room for `least` of the actors, and say so when it has not for all.

    A pending placement group asks an autoscaler for all of them for up to `seconds`; later, Ray Data's pending actors
    request the rest.

    Args:
        each: what an actor takes, by Ray's names, e.g. `{"CPU": 1, "GPU": 0}`; all of it on one node.
        others: what the job's tasks take beside the actors.

    Returns:
        The place, held: release it when the actors are about to take it (`rows_in_place`).

    Raises:
        InsufficientResourcesError: there was no room in time; says what is missing.
    """
    who = "An actor needs" if least == 1 and not others else "{count} actors and their readers need"
    demand = Demand(
        counts=range(actors, least - 1, -1),
        parts=lambda count: [Part("actor", count, each), *([Part("reader", 1, others)] if others else [])],
        subject=who,
        advice="Lower num_actors, cpus_per_actor, gpus_per_actor or memory_gb_per_actor, add nodes, or give them time "
        "with node_wait_seconds.",
    )
    held = reserve(demand, seconds=seconds, fewer_after=0)
    if held.count < actors:
        logger.warning("the cluster has room for %d of %d actors: those run until it grows", held.count, actors)
    return held


def rows_in_place(dataset: ray.data.Dataset, held: Reservation) -> Iterator[dict[str, Any]]:
    """The data set's rows; the place that is held for its actors is given back once they are queued.

    Ray Data starts actors without a placement group; they wait in a node's queue, which is served before placement
    groups are tried again. What remains of a race: an actor or task of another job that waited there before them; then
    the actors run when there is room, and are themselves what the autoscaler is asked for meanwhile.
    """

    class Release(ray_internals.execution_callback()):
        """The first step comes after the pools have asked for their actors."""

        def on_execution_step(self, executor: Any) -> None:
            held.release()

    ray_internals.add_callback(dataset, Release)
    try:
        yield from dataset.iter_rows()
    finally:
        held.release()
