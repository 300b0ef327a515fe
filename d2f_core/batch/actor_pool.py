"""Maps items over a pool of Ray Data actors, and yields results as they arrive."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import ray
import ray.data

from d2f_core.batch.config import ActorPoolConfig
from d2f_core.batch.refusals import checked, guarded
from d2f_core.batch.resources import await_resources
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
        arguments: arguments of the actor's constructor.
        node_wait_seconds: seconds to wait for room for an actor; None: no check, so that the job waits in Ray's queue.

    Raises:
        InsufficientResourcesError: no actor has room.
        RefusedError: what an actor refused.
    """
    if not items:
        return
    actors = min(pool.num_actors, len(items))
    if node_wait_seconds is not None:
        await_resources(actors, {"CPU": pool.cpus_per_actor, "GPU": pool.gpus_per_actor}, seconds=node_wait_seconds)
    dataset = ray.data.from_items([dict(item) for item in items], override_num_blocks=min(len(items), MAX_INPUT_BLOCKS))
    configure(dataset)
    dataset = dataset.map_batches(
        cast(Any, guarded(actor)),
        fn_constructor_args=tuple(arguments),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor or None,
    )
    yield from map(checked, dataset.iter_rows())
