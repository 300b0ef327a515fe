"""Reads the rows of a plan, in its order, with Ray Data.

Each worker of a training has a read task of Ray Data's (`PlanSource`) and an iterator of Ray Data's over its blocks.
Between them is no execution of Ray Data but one actor per worker, on the worker's node, that runs the task:

    scale       Ray Data's coordinator divides every node among all executions anew whenever one comes: one per worker
                takes the cube of the number of workers, a minute for 256. The actors are known to Ray alone.
    CPUs        It rounds each execution's part of a node down, so seven CPUs for eight workers are none. The actor
                reserves none, and starts on a node whose CPUs are all taken; other executions get what they would.
    order       The blocks of a task come in its order, and go to the worker that asked.
    memory      A block is read when it is asked for. So many are asked for as fit into `READY_BYTES`.
"""

import logging
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from d2f_core import ray_internals
from d2f_core.data.plan_source import SCHEMA, BlockReader, PlanSource
from d2f_core.data.prefetch import Prefetcher
from d2f_core.data.ray_data import INIT_DEATHS
from d2f_core.data.stream_plan import StreamPlan
from d2f_core.retry import one_line

logger = logging.getLogger(__name__)

READY_BYTES = 2**28
"""Bytes of finished micro-batches that may wait in the object store for one worker; eight workers of a node fill a
quarter of the store that Ray gives a machine of 32 GB."""
MOST_READY = 32
"""Most blocks that are asked for at a time, however small they are."""
READER: Any = ray.remote(BlockReader)
"""Made once: Ray sends the cluster the code of each actor class that a process makes."""
MICRO_BATCHES_AHEAD = 2
"""Micro-batches taken out of their block ahead of the training."""


class PlanIterator(ray.data.DataIterator):
    """Ray Data's iterator over one worker's micro-batches, in plan order.

    Each iteration reads all of them, with an actor of its own. An actor that dies is replaced by one that goes on with
    the next micro-batch.
    """

    def __init__(self, source: PlanSource, rank: int) -> None:
        self._source, self._rank = source, rank
        self._delivered = 0

    def _to_ref_bundle_iterator(self) -> tuple[Iterator[Any], None, None]:
        return self._bundles(), None, None

    def _bundles(self) -> Iterator[Any]:
        self._delivered, deaths = 0, 0
        while True:
            reader = start_reader(self._source, self._rank, skip=self._delivered)
            try:
                for about, block in _blocks(reader):
                    yield ray_internals.bundle_of(block, about, SCHEMA)
                    self._delivered, deaths = self._delivered + (about.num_rows or 0), 0
                return
            except RayActorError as error:
                deaths += 1
                if deaths == INIT_DEATHS:
                    raise
                logger.warning("the reader of worker %d is started anew: %s", self._rank, one_line(error))
            finally:
                if ray.is_initialized():  # or this process has left the cluster, and the reader is ended with it
                    ray.kill(reader)

    def stats(self) -> str:
        return f"{self._delivered} micro-batches were delivered by the last iteration"

    def schema(self) -> ray.data.Schema:
        return ray.data.Schema(SCHEMA)

    def get_context(self) -> ray.data.DataContext:
        return ray.data.DataContext.get_current()


def start_reader(source: PlanSource, rank: int, *, skip: int = 0) -> Any:
    """The actor that reads a worker's blocks. It is ended by its user, or with the process that started it.

    Args:
        skip: number of the worker's first micro-batches that are left out.
    """
    return READER.options(**_reader_options()).remote(source.read_task(rank, skip=skip))


def _reader_options() -> dict[str, Any]:
    """A reader reserves nothing, lies on this node, whose memory its blocks stay in, and is replaced by its user."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": here}


def _blocks(reader: Any) -> Iterator[tuple[BlockMetadata, Any]]:
    """What each of a reader's blocks holds, and its reference; as many are asked for ahead as may be ready."""
    call = reader.next_block.options(num_returns=2)
    asked = deque([call.remote()])
    while asked:
        about, block = asked.popleft()
        found: BlockMetadata | None = ray.get(about)
        if found is None:
            return
        ready = min(MOST_READY, READY_BYTES // max(1, found.size_bytes or 0))
        while len(asked) < max(1, ready):
            asked.append(call.remote())
        yield found, block


def worker_shard(plan: StreamPlan, *, rank: int, num_workers: int, first_step: int) -> ray.data.DataIterator:
    """Dataset iterator for `micro_batches`: the rows of one worker from `first_step` on, in plan order."""
    return PlanIterator(PlanSource(plan, num_workers=num_workers, first_step=first_step), rank)


def micro_batches(shard: Any) -> Iterator[pa.Table]:
    """The shard's rows as tables of one micro-batch each; reading begins at once."""
    return Prefetcher(_micro_batches(shard), MICRO_BATCHES_AHEAD)


def _micro_batches(shard: Any) -> Iterator[pa.Table]:
    # Nothing is prefetched by the iterator: that is what the reader's blocks are ahead for.
    for block in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for chunk in block.column("micro_batch").chunks:
            for part in _parts(chunk):
                yield pa.ipc.open_stream(part).read_all()


def _parts(chunk: pa.LargeBinaryArray) -> Iterator[pa.Buffer]:
    """The array's values without copying: indexing an Arrow array copies, which takes 0.5 ms per 2 MB."""
    _, ends, data = chunk.buffers()
    places = np.frombuffer(ends, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
    for start, end in pairwise(places):
        yield data.slice(start, end - start)
