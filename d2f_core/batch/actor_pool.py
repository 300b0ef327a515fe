"""Maps items over a pool of Ray Data actors, and yields results as they arrive."""

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any, cast

import ray
import ray.data

from d2f_core.batch.config import ActorPoolConfig
from d2f_core.batch.refusals import checked, guarded
from d2f_core.batch.resources import await_resources, rows_in_place
from d2f_core.data.ray_data import configure

MAX_INPUT_BLOCKS = 1000
"""Most blocks that the items are split into: each has some overhead, and an actor takes one at a time."""


def map_items(
    items: Sequence[Mapping[str, Any]],
    actor: type,
    arguments: Sequence[Any],
    pool: ActorPoolConfig,
    *,
    node_wait_seconds: float | None,
) -> Iterator[dict[str, Any]]:
    """One result per item, in order of completion; uses at most as many actors as items.

    Args:
        actor: called with a batch of one item, as arrays of length 1 by name; returns the result in the same form.
        arguments: of its constructor.
        node_wait_seconds: how long room for an actor is waited for; None: without end, and said every minute.

    Raises:
        InsufficientResourcesError: no actor has room.
        RefusedError: what an actor refused.
    """
    if not items:
        return
    actors = min(pool.num_actors, len(items))
    dataset = ray.data.from_items([dict(item) for item in items], override_num_blocks=min(len(items), MAX_INPUT_BLOCKS))
    configure(dataset)
    dataset = dataset.map_batches(
        cast(Any, guarded(actor)),
        fn_constructor_args=tuple(arguments),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor or None,
        memory=pool.each_actor["memory"] or None,
    )
    wait = inf if node_wait_seconds is None else node_wait_seconds
    held = await_resources(actors, pool.each_actor, seconds=wait)
    yield from map(checked, rows_in_place(dataset, held))
