"""A planned order of rows, read by Ray Data.

Each worker of a training has a dataset of its own, made from the plan: micro-batch numbers go through an actor that
knows which rows they are and reads them. Ray Data brings the actors, prefetching and back-pressure; the order is the
plan's.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import ray.train

from d2f_core import storage
from d2f_core.data.manifest import Manifest, read_manifest
from d2f_core.data.order import SampleOrder

EPOCH, ROW = "epoch", "row"
CACHE_BYTES = 256 * 2**20
MICRO_BATCHES_PER_TASK = 32


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
    """Ray Data actor: micro-batch numbers -> their rows, with the columns `epoch` and `row` added."""

    def __init__(self, plan: StreamPlan, rank: int, num_workers: int) -> None:
        self._plan, self._rank, self._num_workers = plan, rank, num_workers
        self._reader = RowReader(plan.uri, read_manifest(plan.uri), plan.columns)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        positions = np.concatenate([self._plan.positions(int(i), self._rank, self._num_workers) for i in batch["id"]])
        epochs, rows = self._plan.order.at(positions)
        return self._reader.read(rows).append_column(EPOCH, pa.array(epochs)).append_column(ROW, pa.array(rows))


def worker_dataset(plan: StreamPlan, rank: int, num_workers: int) -> ray.data.Dataset:
    """The rows of one worker, in plan order."""
    count = plan.num_micro_batches(num_workers)
    dataset = ray.data.range(count, override_num_blocks=max(1, -(-count // MICRO_BATCHES_PER_TASK)))
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False  # the worker logs plain lines of its own
    return dataset.map_batches(
        cast(Any, PlanReader),
        fn_constructor_args=(plan, rank, num_workers),
        batch_size=8,
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
