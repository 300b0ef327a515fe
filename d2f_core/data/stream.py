"""A planned order of rows, read by Ray Data.

Each worker of a training has a dataset of its own, made from the plan: numbers of micro-batches go through an actor
that knows which rows they are, reads the windows that hold them ahead of time, and puts them together. Ray Data brings
the actor, its restarts, prefetching and back-pressure; the order is the plan's.
"""

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback  # Ray exports it nowhere else

from d2f_core.data.plan_reader import PlanReader, chunk_size
from d2f_core.data.prefetch import Prefetcher
from d2f_core.data.ray_data import configure
from d2f_core.data.stream_plan import StreamPlan

CHUNKS_PER_TASK = 4
MAX_TASKS = 2000
"""Reading tasks of one worker; the chunks of a longer training share them."""
BLOCK_BYTES = 32 * 2**20
"""Size at which a reading task hands rows on, before it has read all of its own. A block takes some 70 ms through Ray
Data whatever its size: with half of this, half as many rows arrive in a second."""
READY_BYTES = 2**30
"""Micro-batches that may wait for one worker, in the object store."""
MICRO_BATCHES_AHEAD = 2
"""Taken out of their block before the training wants them."""
BUSY_STEP = 0.01
"""Seconds: an executor's step that took less, and moved no block, had nothing to do."""
SHORTEST_REST, LONGEST_REST = 0.0005, 0.03
"""Idle back-off in seconds: starts at SHORTEST_REST and doubles up to LONGEST_REST."""


class RestingExecutor(ExecutionCallback):
    """Lets an executor of Ray Data rest when there is nothing to wait for.

    Its loop waits for running tasks only. Once all rows are read, or as many as may be buffered, none runs, and it
    would turn without a pause until the training has consumed them: two thirds of a core per worker.
    """

    def __init__(self) -> None:
        self._last, self._moved, self._rest = time.perf_counter(), 0, SHORTEST_REST

    def on_execution_step(self, executor: Any) -> None:
        counts = [one.metrics for one in executor._topology]
        moved = sum(one.num_task_outputs_generated + one.num_outputs_taken for one in counts)
        if moved == self._moved and time.perf_counter() - self._last < BUSY_STEP:
            time.sleep(self._rest)
            self._rest = min(2 * self._rest, LONGEST_REST)
        else:
            self._rest = SHORTEST_REST
        self._last, self._moved = time.perf_counter(), moved


def worker_shard(plan: StreamPlan, *, rank: int, num_workers: int, first_step: int) -> ray.data.DataIterator:
    """What `micro_batches` reads: the rows of one worker from `first_step` on, in plan order."""
    micro = (plan.num_steps - first_step) * plan.per_step(num_workers)
    chunks = np.arange(-(-micro // chunk_size(plan)), dtype=np.int64)
    # Made here, because each of `ray.data.range`'s reading tasks would start a process for a few numbers.
    tasks = min(-(-len(chunks) // CHUNKS_PER_TASK), MAX_TASKS)
    blocks = [pa.table({"chunk": part}) for part in np.array_split(chunks, tasks)]
    dataset = ray.data.from_arrow(blocks)
    configure(dataset)
    context = dataset.context
    context.execution_options.preserve_order = True
    # By default a quarter of the node's memory is filled with rows that are not wanted yet.
    context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=READY_BYTES)
    context.enable_progress_bars = False  # the worker logs plain lines of its own
    context.target_max_block_size = BLOCK_BYTES
    context.custom_execution_callback_classes = [RestingExecutor]
    dataset = dataset.map_batches(
        cast(Any, PlanReader),
        fn_constructor_args=(plan, rank, num_workers, first_step),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0.5,
        zero_copy_batch=True,
    )
    # A split into one: its executor runs in an actor. Beside the training loop it would take the interpreter's lock
    # every few milliseconds, which made steps three times as long on a small CPU model.
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
    """Its values where they lie: an element of an Arrow array is a copy, half a millisecond for each two megabytes."""
    _, ends, data = chunk.buffers()
    places = np.frombuffer(ends, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
    for start, end in pairwise(places):
        yield data.slice(start, end - start)
