"""Which rows each worker of a training sees, micro-batch by micro-batch: arithmetic only."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from d2f_core.data.sample_order import BucketSchedule, SampleOrder

BUFFER_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Source:
    """One table to train on. The tables of a training are its buckets: a batch holds rows of one of them."""

    uri: str
    order: SampleOrder


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one worker uses in one forward pass."""

    source: int
    """Which of the plan's tables."""
    epochs: np.ndarray
    """Int64 [samples]: how often the table was used up before."""
    rows: np.ndarray
    """Int64 [samples]: rows of that table."""


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """The data of a whole training."""

    sources: tuple[Source, ...]
    columns: tuple[str, ...]
    global_batch_size: int
    micro_batch_size: int
    num_steps: int
    """Optimizer steps of the whole training."""
    seed: int = 0
    buffer_bytes: int = BUFFER_BYTES
    """Memory of each worker's reader. It decides how much is read ahead, never which rows come when."""

    @cached_property
    def _schedule(self) -> BucketSchedule:
        batches = (-(-source.order.num_samples // self.global_batch_size) for source in self.sources)
        return BucketSchedule(batches=tuple(batches), seed=self.seed)

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        """What to add to a row number of each table, so that numbers are unique over all of them."""
        return tuple(np.cumsum([0, *(source.order.num_rows for source in self.sources[:-1])]).tolist())

    @property
    def num_samples(self) -> int:
        """Training samples of all tables."""
        return sum(source.order.num_samples for source in self.sources)

    def per_step(self, num_workers: int) -> int:
        """Micro-batches of one worker in an optimizer step."""
        return self.global_batch_size // num_workers // self.micro_batch_size

    def positions(self, step: int, part: int, rank: int, num_workers: int) -> tuple[int, np.ndarray]:
        """The table, and int64 positions in its order, of one worker's micro-batch `part` of a step.

        A step's global batch is cut into one contiguous share per worker, each share into micro-batches.
        """
        source, nth = self._schedule.at(step)
        share = self.global_batch_size // num_workers
        start = nth * self.global_batch_size + rank * share + part * self.micro_batch_size
        return source, np.arange(start, start + self.micro_batch_size, dtype=np.int64)

    def micro_batch(self, number: int, rank: int, num_workers: int) -> MicroBatch:
        """The `number`-th micro-batch of a worker, counted from the first step of the whole training."""
        step, part = divmod(number, self.per_step(num_workers))
        source, positions = self.positions(step, part, rank, num_workers)
        epochs, rows = self.sources[source].order.at(positions)
        return MicroBatch(source=source, epochs=epochs, rows=rows)
