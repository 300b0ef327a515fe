"""A planned order of rows, read by Ray Data.

Each worker of a training has a dataset of its own, made from the plan: micro-batch numbers go through an actor that
knows which rows they are and reads them. Ray Data brings the actors, prefetching and back-pressure; the order is the
plan's.
"""

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import ray.train
from ray.data._internal.execution.execution_callback import ExecutionCallback  # Ray exports it nowhere else

from d2f_core import storage
from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.data.order import SampleOrder

EPOCH, ROW = "epoch", "row"
CACHE_BYTES = 256 * 2**20
MICRO_BATCHES_PER_CHUNK = 32
MAX_TASKS = 2000
"""Reading tasks of one worker; the chunks of a longer training share them."""
BLOCK_BYTES = 16 * 2**20
"""Size at which a reading task hands rows on, before it has read all of its own."""
BUSY_STEP, REST = 0.01, 0.05
"""Seconds: an executor's step that took less than the first waited for nothing; then it rests for the second."""


class RowReader:
    """Random access to the rows of a table, by row group, with the last ones kept."""

    def __init__(self, uri: str, manifest: Manifest, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        self._filesystem, root = storage.arrow_filesystem(uri)
        groups = [
            (f"{root}/{file.path}", group, rows)
            for file in manifest.files
            for group, rows in enumerate(file.row_groups)
        ]
        self._groups = [(path, group) for path, group, _ in groups]
        self._starts = np.concatenate([[0], np.cumsum([rows for *_, rows in groups])])
        self._open: dict[str, pq.ParquetFile] = {}
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached_bytes = 0

    def _group(self, number: int) -> pa.Table:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        path, group = self._groups[number]
        if path not in self._open:
            self._open[path] = pq.ParquetFile(self._filesystem.open_input_file(path))
        table = self._open[path].read_row_group(group, columns=self._columns)
        self._cache[number] = table
        self._cached_bytes += table.nbytes
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return table

    def read(self, rows: np.ndarray) -> pa.Table:
        """The given rows, in the given order."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        tables = [self._group(int(n)).slice(int(r - self._starts[n]), 1) for n, r in zip(numbers, rows, strict=True)]
        return pa.concat_tables(tables).combine_chunks()


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """Which rows each worker sees, micro-batch by micro-batch."""

    uri: str
    columns: tuple[str, ...]
    order: SampleOrder
    global_batch_size: int
    micro_batch_size: int
    first_step: int
    """Optimizer steps already done."""
    num_steps: int
    """Optimizer steps of the whole training."""

    def positions(self, micro_batch: int, rank: int, num_workers: int) -> np.ndarray:
        """Int64 positions of one worker's `micro_batch`, counted from `first_step` on.

        A step's global batch is cut into one contiguous share per worker, each share into micro-batches.
        """
        share = self.global_batch_size // num_workers
        step, part = divmod(micro_batch, share // self.micro_batch_size)
        start = (self.first_step + step) * self.global_batch_size + rank * share + part * self.micro_batch_size
        return np.arange(start, start + self.micro_batch_size, dtype=np.int64)

    def num_micro_batches(self, num_workers: int) -> int:
        """Micro-batches that one worker has still to do."""
        return (self.num_steps - self.first_step) * (self.global_batch_size // num_workers // self.micro_batch_size)


class PlanReader:
    """Ray Data actor: numbers of chunks of micro-batches -> their rows, with the columns `epoch` and `row` added."""

    def __init__(self, plan: StreamPlan, rank: int, num_workers: int) -> None:
        self._plan, self._rank, self._num_workers = plan, rank, num_workers
        self._reader = RowReader(plan.uri, read_manifest(plan.uri), plan.columns)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        (chunk,) = (int(number) for number in batch["chunk"])
        first, end = chunk * MICRO_BATCHES_PER_CHUNK, self._plan.num_micro_batches(self._num_workers)
        numbers = range(first, min(first + MICRO_BATCHES_PER_CHUNK, end))
        positions = np.concatenate([self._plan.positions(number, self._rank, self._num_workers) for number in numbers])
        epochs, rows = self._plan.order.at(positions)
        return self._reader.read(rows).append_column(EPOCH, pa.array(epochs)).append_column(ROW, pa.array(rows))


class RestingExecutor(ExecutionCallback):
    """Lets an executor of Ray Data rest when there is nothing to wait for.

    Its loop waits for running tasks only. Once all rows are read, or as many as may be buffered, none runs, and it
    would turn without a pause until the training has consumed them: two thirds of a core per worker.
    """

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def on_execution_step(self, executor: Any) -> None:
        del executor
        if time.perf_counter() - self._last < BUSY_STEP:
            time.sleep(REST)
        self._last = time.perf_counter()


def worker_dataset(plan: StreamPlan, rank: int, num_workers: int) -> ray.data.Dataset:
    """The rows of one worker, in plan order."""
    chunks = np.arange(-(-plan.num_micro_batches(num_workers) // MICRO_BATCHES_PER_CHUNK), dtype=np.int64)
    # Made here, because each of `ray.data.range`'s reading tasks would start a process for a few numbers.
    blocks = [pa.table({"chunk": part}) for part in np.array_split(chunks, min(len(chunks), MAX_TASKS))]
    dataset = ray.data.from_arrow(blocks)
    context = dataset.context
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # the worker logs plain lines of its own
    context.target_max_block_size = BLOCK_BYTES
    context.custom_execution_callback_classes = [RestingExecutor]
    return dataset.map_batches(
        cast(Any, PlanReader),
        fn_constructor_args=(plan, rank, num_workers),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0.5,
        zero_copy_batch=True,
    )


class PlannedData(ray.train.DataConfig):
    """Gives every Ray Train worker its own planned dataset under the name `train`."""

    def __init__(self, plan: StreamPlan) -> None:
        super().__init__()
        self._plan = plan

    def configure(
        self,
        datasets: dict[str, ray.data.Dataset],
        world_size: int,
        worker_handles: list[Any] | None,
        worker_node_ids: list[Any] | None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        # A split into one: its executor runs in an actor. Beside the training loop it would take the interpreter's lock
        # every few milliseconds, which made steps three times as long on a small CPU model.
        return [
            {"train": worker_dataset(self._plan, rank, world_size).streaming_split(1)[0]} for rank in range(world_size)
        ]


def micro_batches(shard: Any, micro_batch_size: int) -> Iterator[pa.Table]:
    """The shard's rows as tables of exactly one micro-batch each."""
    yield from shard.iter_batches(batch_size=micro_batch_size, batch_format="pyarrow", prefetch_batches=2)
