"""Which rows each worker of a training sees, micro-batch by micro-batch: arithmetic only.

The rows of a training come from sources: tables, or parts of tables. Either each global batch holds rows of one source,
or each micro-batch does. Micro-batch g of the whole training stands at place g mod n of step g // n, where n is the
number of micro-batches in a global batch; each worker takes a contiguous share of a step's. So the micro-batches of a
step, and what is in each, are the same on any number of workers.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from d2f_core.data.sample_order import BucketSchedule, RowSchedule, SampleOrder

BUFFER_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Source:
    """A bucket: rows of a table, often all of them, that share batches."""

    uri: str
    order: SampleOrder
    """Sample order of the source's rows, numbered from its first row."""
    first_row: int = 0
    """Rows of the table's sources before it, which is where in the table its own begin unless `rows` lists them."""
    digest: str = ""
    """Of the table, as it was when the run was planned; a reader refuses another one. Empty: any table will do."""
    rows: tuple[int, ...] = ()
    """Its rows in the table, where they lie apart; empty: they follow one another."""

    def __post_init__(self) -> None:
        if self.rows and len(self.rows) != self.order.num_rows:
            raise ValueError(f"A source of {self.uri!r} lists {len(self.rows)} rows; its order has another number.")

    def table_rows(self, rows: np.ndarray) -> np.ndarray:
        """Int64 row numbers in the table of rows that are numbered within the source."""
        return self._listed[rows] if self.rows else rows + self.first_row

    @cached_property
    def _listed(self) -> np.ndarray:
        return np.array(self.rows, np.int64)

    def holdout(self) -> np.ndarray:
        """Int64 row numbers of the table that training never sees."""
        return self.table_rows(self.order.holdout())

    def window_of(self, rows: np.ndarray) -> np.ndarray:
        """The window, int64, that each training row of the table belongs to; of rows that follow one another."""
        return self.order.window_of(rows - self.first_row)

    def window_bounds(self, window: int) -> tuple[int, int]:
        """First and one past the last row of a window, in the table; held-out rows may lie between. Of rows that follow
        one another.
        """
        first, end = self.order.window_bounds(window)
        return self.first_row + first, self.first_row + end


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The rows that one worker uses in one forward pass."""

    source: int
    """Index of the source in the plan's `sources`."""
    epochs: np.ndarray
    """Int64 [samples]: each row's epoch: how often the source had been used up before."""
    rows: np.ndarray
    """Int64 [samples]: row numbers in the source's table."""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """The data of a whole training."""

    sources: tuple[Source, ...]
    """Sources of the same table are adjacent, in row order, and cover the table."""
    columns: tuple[str, ...]
    global_batch_size: int
    micro_batch_size: int
    num_steps: int
    """Optimizer steps of the whole training."""
    seed: int = 0
    one_source_per: Literal["global_batch", "micro_batch"] = "global_batch"
    """Unit that holds rows of one source only; `batch` in the sources' orders is its size."""
    in_proportion_to: Literal["batches", "rows"] = "batches"
    """How often sources take turns: by their batches per epoch, of which a last one that is not full counts whole; or
    by their rows, so that those of small sources are not seen more often than others."""
    buffer_bytes: int = BUFFER_BYTES
    """Memory of each worker's reader in bytes. It determines how much is read ahead, never the order of rows."""

    def __post_init__(self) -> None:
        if self.buffer_bytes < 1:
            raise ValueError(f"buffer_bytes={self.buffer_bytes} must be at least 1. Use {BUFFER_BYTES}, 2 GiB.")
        end = 0
        for before, source in zip((None, *self.sources), self.sources, strict=False):
            if source.first_row and (before is None or before.uri != source.uri or source.first_row != end):
                raise ValueError(
                    f"The source of {source.uri!r} from row {source.first_row} on does not follow on another of this "
                    "table. List all sources of a table, one after another, in row order."
                )
            end = source.first_row + source.order.num_rows
        if self.one_source_per == "micro_batch":
            self._check_micro_batches()

    def _check_micro_batches(self) -> None:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of micro_batch_size="
                f"{self.micro_batch_size}. Choose one that is."
            )
        for source in self.sources:
            if source.order.batch != self.micro_batch_size:
                raise ValueError(
                    f"batch={source.order.batch} of an order is not micro_batch_size={self.micro_batch_size}, and each "
                    "micro-batch is to hold rows of one source. Give the order that batch."
                )

    @property
    def _batch_size(self) -> int:
        """Rows in the unit that holds one source only."""
        return self.global_batch_size if self.one_source_per == "global_batch" else self.micro_batch_size

    @cached_property
    def _schedule(self) -> BucketSchedule | RowSchedule:
        if self.in_proportion_to == "rows":
            rows = tuple(source.order.num_samples for source in self.sources)
            return RowSchedule(rows=rows, batch=self._batch_size, seed=self.seed)
        batches = (-(-source.order.num_samples // self._batch_size) for source in self.sources)
        return BucketSchedule(batches=tuple(batches), seed=self.seed)

    @cached_property
    def tables(self) -> tuple[str, ...]:
        """URIs of the tables; a table that was given twice appears twice."""
        return tuple(source.uri for source in self.sources if not source.first_row)

    @cached_property
    def table_of(self) -> tuple[int, ...]:
        """Index in `tables` of each source's table: every source with `first_row` 0 starts a new table."""
        return tuple((np.cumsum([not source.first_row for source in self.sources]) - 1).tolist())

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        """Offset per source that makes its table's row numbers unique over all tables."""
        before = np.cumsum([0, *(source.order.num_rows for source in self.sources[:-1])])
        return tuple((before - [source.first_row for source in self.sources]).tolist())

    @property
    def num_samples(self) -> int:
        """Training samples of all tables."""
        return sum(source.order.num_samples for source in self.sources)

    def per_step(self, num_workers: int) -> int:
        """Micro-batches per worker and optimizer step."""
        return self.global_batch_size // num_workers // self.micro_batch_size

    def positions(self, step: int, part: int, rank: int, num_workers: int) -> tuple[int, np.ndarray]:
        """The source, and int64 positions in its order, of one worker's micro-batch `part` of a step.

        A step's global batch is split into one contiguous share per worker, and each share into micro-batches.
        """
        offset = rank * (self.global_batch_size // num_workers) + part * self.micro_batch_size
        if self.one_source_per == "micro_batch":
            step, offset = (step * self.global_batch_size + offset) // self.micro_batch_size, 0
        source, nth = self._schedule.at(step)
        start = nth * self._batch_size + offset
        return source, np.arange(start, start + self.micro_batch_size, dtype=np.int64)

    def micro_batch(self, number: int, rank: int, num_workers: int) -> MicroBatch:
        """The `number`-th micro-batch of a worker, counted from the first step of the whole training."""
        step, part = divmod(number, self.per_step(num_workers))
        source, positions = self.positions(step, part, rank, num_workers)
        epochs, rows = self.sources[source].order.at(positions)
        return MicroBatch(source=source, epochs=epochs, rows=self.sources[source].table_rows(rows))
