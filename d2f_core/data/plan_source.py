"""The rows of a plan as a source of Ray Data's, and the actor that reads one worker's part of it."""

import functools
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray.data
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.datasource import ReadTask

from d2f_core.data.plan_reader import PlanReader
from d2f_core.data.stream_plan import StreamPlan

BLOCK_BYTES = 32 * 2**20
"""Most bytes of a block, unless a single micro-batch has more."""
SCHEMA = pa.schema([pa.field("micro_batch", pa.large_binary())])


class PlanSource(ray.data.Datasource):
    """The rows of a plan for Ray Data: one read task per worker, whose blocks come in the plan's order.

    A row of a block is a micro-batch, an Arrow IPC stream (see `PlanReader`). `ray.data.read_datasource` makes a
    dataset of all workers' micro-batches; a training's workers each run their own task, by a `BlockReader`.

    Args:
        first_step: optimizer step at which reading begins.
    """

    def __init__(self, plan: StreamPlan, *, num_workers: int, first_step: int = 0) -> None:
        super().__init__()
        self._plan, self._num_workers, self._first_step = plan, num_workers, first_step

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        del parallelism, data_context  # a worker's blocks come in order only if one task reads them
        return [self.read_task(rank, row_limit=per_task_row_limit) for rank in range(self._num_workers)]

    def read_task(self, rank: int, *, skip: int = 0, row_limit: int | None = None) -> ReadTask:
        """The task of one worker.

        Args:
            skip: number of its first micro-batches that are left out.
            row_limit: most micro-batches that it yields; None: all.
        """
        rest = (self._plan.num_steps - self._first_step) * self._plan.per_step(self._num_workers) - skip
        about = BlockMetadata(num_rows=rest, size_bytes=None, exec_stats=None)
        read = functools.partial(_blocks, self._plan, rank, self._num_workers, self._first_step, skip)
        return ReadTask(read, about, schema=SCHEMA, per_task_row_limit=row_limit)

    def estimate_inmemory_data_size(self) -> int | None:
        return None


def _blocks(plan: StreamPlan, rank: int, num_workers: int, first_step: int, skip: int) -> Iterator[pa.Table]:
    for chunk in PlanReader(plan, rank, num_workers, first_step, skip):
        rows = max(1, chunk.num_rows * BLOCK_BYTES // max(1, chunk.nbytes))
        for first in range(0, chunk.num_rows, rows):
            yield chunk.slice(first, rows)


class BlockReader:
    """Ray actor that runs a read task of Ray Data's: one block per call, in the task's order.

    It works only when it is asked, so whoever asks decides how many blocks are ready at a time.
    """

    def __init__(self, task: ReadTask) -> None:
        self._task, self._blocks = task, None

    def next_block(self) -> tuple[BlockMetadata | None, Block | None]:
        """The next block and what it holds; two Nones after the last.

        Raises:
            Whatever the task raises; after that no block comes.
        """
        if self._blocks is None:
            self._blocks = iter(self._task())
        block = next(self._blocks, None)
        return (None, None) if block is None else (BlockAccessor.for_block(block).get_metadata(), block)
