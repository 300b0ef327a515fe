"""Reads the rows of a plan, in its order, with Ray Data.

Each worker of a training has a dataset of its own, made from the plan: micro-batch numbers go through an actor that
looks up their rows, reads the windows that hold them ahead of time, and assembles them. Ray Data brings the actor, its
restarts, prefetching and back-pressure; the order is the plan's.
"""

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray.data

from d2f_core import ray_internals
from d2f_core.data.plan_reader import PlanReader, chunk_size
from d2f_core.data.prefetch import Prefetcher
from d2f_core.data.ray_data import configure
from d2f_core.data.stream_plan import StreamPlan

CHUNKS_PER_TASK = 4
MAX_TASKS = 2000
"""Most read tasks per worker; in a longer training, each task reads more chunks."""
BLOCK_BYTES = 32 * 2**20
"""Block size in bytes at which a read task yields rows, before it has read all of them. Ray Data spends about 70 ms per
block whatever its size: half the block size halves the rows per second."""
READY_BYTES = 2**30
"""Bytes of finished micro-batches that may wait in the object store for one worker."""
MICRO_BATCHES_AHEAD = 2
"""Micro-batches taken out of their block ahead of the training."""
BUSY_STEP = 0.01
"""Seconds; a scheduling step of the executor that was shorter and moved no block counts as idle."""
SHORTEST_REST, LONGEST_REST = 0.0005, 0.03
"""Idle back-off in seconds: starts at SHORTEST_REST and doubles up to LONGEST_REST."""


class RestingExecutor(ray_internals.execution_callback()):
    """Callback that makes a Ray Data executor sleep while it is idle, instead of spinning.

    The executor's loop waits only for running tasks. When all rows are read, or the buffer is full, no task runs, and
    the loop would spin until the training has consumed rows: two thirds of a core per worker.
    """

    def __init__(self) -> None:
        self._last, self._moved, self._rest = time.perf_counter(), 0, SHORTEST_REST

    def on_execution_step(self, executor: Any) -> None:
        moved = ray_internals.blocks_moved(executor)
        if moved == self._moved and time.perf_counter() - self._last < BUSY_STEP:
            time.sleep(self._rest)
            self._rest = min(2 * self._rest, LONGEST_REST)
        else:
            self._rest = SHORTEST_REST
        self._last, self._moved = time.perf_counter(), moved


def worker_shard(plan: StreamPlan, *, rank: int, num_workers: int, first_step: int) -> ray.data.DataIterator:
    """Dataset iterator for `micro_batches`: the rows of one worker from `first_step` on, in plan order."""
    micro = (plan.num_steps - first_step) * plan.per_step(num_workers)
    chunks = np.arange(-(-micro // chunk_size(plan)), dtype=np.int64)
    # Built in this process: each read task of `ray.data.range` would start a process for a few numbers.
    tasks = min(-(-len(chunks) // CHUNKS_PER_TASK), MAX_TASKS)
    blocks = [pa.table({"chunk": part}) for part in np.array_split(chunks, tasks)]
    dataset = ray.data.from_arrow(blocks)
    configure(dataset)
    context = dataset.context
    context.execution_options.preserve_order = True
    # By default, Ray Data would fill a quarter of the node's memory with rows read ahead.
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=READY_BYTES)
    context.enable_progress_bars = False  # the worker logs plain lines of its own
    context.target_max_block_size = BLOCK_BYTES
    ray_internals.add_callback(dataset, RestingExecutor)
    dataset = dataset.map_batches(
        cast(Any, PlanReader),
        fn_constructor_args=(plan, rank, num_workers, first_step),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0.5,
        zero_copy_batch=True,
    )
    # A split into one, because its executor then runs in an actor. In the training process it would take the GIL every
    # few milliseconds, which made steps three times as long on a small CPU model.
    return dataset.streaming_split(1)[0]


def micro_batches(shard: Any) -> Iterator[pa.Table]:
    """The shard's rows as tables of one micro-batch each; reading begins at once."""
    return Prefetcher(_micro_batches(shard), MICRO_BATCHES_AHEAD)


def _micro_batches(shard: Any) -> Iterator[pa.Table]:
    for block in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        for chunk in block.column("micro_batch").chunks:
            for part in _parts(chunk):
                yield pa.ipc.open_stream(part).read_all()


def _parts(chunk: pa.LargeBinaryArray) -> Iterator[pa.Buffer]:
    """The array's values without copying: indexing an Arrow array copies, which takes 0.5 ms per 2 MB."""
    _, ends, data = chunk.buffers()
    places = np.frombuffer(ends, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
    for start, end in pairwise(places):
        yield data.slice(start, end - start)
