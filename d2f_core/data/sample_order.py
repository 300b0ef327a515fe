"""The order of samples: a pure function of (seed, epoch, table, batch). The position in it is one integer.

Position p of a training is sample p mod N of epoch p // N, so batches run on across epoch edges: every sample is used
exactly once per epoch and nothing is dropped. Nothing here depends on the number of workers.

An epoch is shuffled in two levels, so that reading stays sequential however large the table is:

    windows    `window_rows` consecutive rows are read at once and shuffled among themselves; so are the windows.
    lanes      the sequence of windows is cut into `lanes` equal pieces, and every batch takes its share of each: a
               batch mixes rows from many windows, while a worker, whose share of a batch is that of some lanes, reads
               the windows of its own lanes only.

A plan costs O(windows) per epoch, which are 2 million for a table of 1e9 rows. A table of one window is shuffled whole.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from d2f_core.randomness import keyed_generator


@lru_cache(maxsize=256)
def _permutation(count: int, seed: int, key: int, purpose: str) -> np.ndarray:
    return keyed_generator(seed, key, purpose).permutation(count)


@lru_cache(maxsize=4)
def _windows(count: int, seed: int, epoch: int) -> tuple[np.ndarray, int]:
    """The windows of an epoch in shuffled order, and the position of the table's last window in that order."""
    windows = _permutation(count, seed, epoch, "windows")
    return windows, int(np.flatnonzero(windows == count - 1)[0])


@lru_cache(maxsize=2)
def _cycle(batches: tuple[int, ...], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """The bucket of each batch of a cycle, and how many batches of the cycle came from that bucket before."""
    labels = np.repeat(np.arange(len(batches), dtype=np.int32), batches)
    buckets = labels[keyed_generator(seed, cycle, "buckets").permutation(len(labels))]
    before = np.empty(len(buckets), np.int64)
    before[np.argsort(buckets, kind="stable")] = np.concatenate([np.arange(count) for count in batches])
    return buckets, before


def _ceil_divide(values: np.ndarray, by: int) -> np.ndarray:
    return -(-values // by)


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    num_rows: int
    """Rows of the table."""
    holdout_rows: int = 0
    """Rows kept out of training, spread evenly over the table."""
    seed: int = 0
    batch: int = 1
    """Samples per optimizer step, over all workers."""
    lanes: int = 16
    """Sequences of windows that are read side by side."""
    window_rows: int = 512
    """Consecutive rows that are read and shuffled together."""

    def __post_init__(self) -> None:
        if not 0 <= self.holdout_rows < self.num_rows:
            raise ValueError(
                f"holdout_rows={self.holdout_rows} must be at least 0 and less than the table's {self.num_rows} rows."
            )
        for name in ("batch", "lanes", "window_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def num_samples(self) -> int:
        """Training samples per epoch."""
        return self.num_rows - self.holdout_rows

    @property
    def num_windows(self) -> int:
        return -(-self.num_samples // self.window_rows)

    @property
    def _stride(self) -> int:
        return self.num_rows // self.holdout_rows if self.holdout_rows else 0

    def holdout(self) -> np.ndarray:
        """Int64 row numbers that training never sees: every stride-th row."""
        return np.arange(self.holdout_rows, dtype=np.int64) * self._stride

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and row number (int64 each) of each position (int64)."""
        epochs, offsets = np.divmod(positions, self.num_samples)
        dense = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            dense[chosen] = self._shuffled(int(epoch), self._in_lanes(offsets[chosen]))
        return epochs, self._row(dense)

    def window_of(self, rows: np.ndarray) -> np.ndarray:
        """The window, int64, that each training row belongs to."""
        return self._dense(rows) // self.window_rows

    def window_bounds(self, window: int) -> tuple[int, int]:
        """First and one past the last row of a window; held-out rows may lie between."""
        ends = np.array([window * self.window_rows, min((window + 1) * self.window_rows, self.num_samples) - 1])
        first, last = self._row(ends).tolist()
        return first, last + 1

    def _in_lanes(self, offsets: np.ndarray) -> np.ndarray:
        """Place in an epoch -> place in its sequence of shuffled windows.

        Each lane is a stretch of that sequence, and has slots of its own in every batch, side by side. Batch after
        batch it fills them with its next places. What is left of the epoch after the last full batch follows in order.

        Example: 9 samples, batches of 4, 2 lanes, windows of 2. There are 2 full batches. Slots 0 and 1 of a batch are
        lane 0's, which is places 0 to 3; slots 2 and 3 are lane 1's, places 4 to 7, and it starts one place (half a
        window) into them, going round. So the epoch takes the places 0 1 5 6, then 2 3 7 4, then 8.
        """
        lanes, full_batches = min(self.lanes, self.batch, self.num_windows), self.num_samples // self.batch
        if lanes == 1 or not full_batches:
            return offsets
        batch_number, slot = np.divmod(offsets, self.batch)
        lane = slot * lanes // self.batch
        first_slot = _ceil_divide(lane * self.batch, lanes)
        slots = _ceil_divide((lane + 1) * self.batch, lanes) - first_slot
        lane_start, lane_length = full_batches * first_slot, full_batches * slots
        # Each lane starts at another place within its first window, or all would need their next window at once.
        head_start = lane * self.window_rows // lanes
        inside = (batch_number * slots + slot - first_slot + head_start) % lane_length
        return np.where(offsets < full_batches * self.batch, lane_start + inside, offsets)

    def _shuffled(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Place in an epoch's sequence of shuffled windows -> training sample number.

        Example: 7 samples, windows of 3. Window 0 holds samples 0 to 2, window 1 samples 3 to 5, and window 2, the
        table's last, only sample 6: it is 2 rows short. If the windows come in the order 1, 2, 0, place 5 lies behind
        the short one; were that whole, it would be place 5 + 2 = 7: number 7 // 3 = 2 in the order, window 0, and
        7 % 3 = 1 in it, which is the second of window 0's samples as they are shuffled among themselves.
        """
        rows_of_last = self.num_samples - (self.num_windows - 1) * self.window_rows
        windows, turn_of_last = _windows(self.num_windows, self.seed, epoch)
        is_behind_last = places >= turn_of_last * self.window_rows + rows_of_last
        as_if_whole = np.where(is_behind_last, places + self.window_rows - rows_of_last, places)
        turn, inside = np.divmod(as_if_whole, self.window_rows)
        window_at = windows[turn]
        samples = np.empty_like(places)
        for window in np.unique(window_at).tolist():
            chosen = window_at == window
            rows = rows_of_last if window == self.num_windows - 1 else self.window_rows
            order = _permutation(rows, self.seed, epoch * self.num_windows + window, "order")
            samples[chosen] = window * self.window_rows + order[inside[chosen]]
        return samples

    def _row(self, dense: np.ndarray) -> np.ndarray:
        """Training sample number -> row number: skip the held-out row at the head of each stride."""
        if not self.holdout_rows:
            return dense
        if self._stride == 1:
            return dense + self.holdout_rows
        headed = self.holdout_rows * (self._stride - 1)
        return np.where(dense < headed, dense + dense // (self._stride - 1) + 1, dense + self.holdout_rows)

    def _dense(self, rows: np.ndarray) -> np.ndarray:
        """Row number of a training row -> training sample number."""
        if not self.holdout_rows:
            return rows
        return rows - np.minimum(rows // self._stride + 1, self.holdout_rows)


@dataclass(frozen=True, kw_only=True)
class BucketSchedule:
    """The bucket that each batch is taken from; each bucket has its own `SampleOrder`.

    Over a cycle of as many batches as all buckets have per epoch (a last partial one counts), the batches of the
    buckets are shuffled; then the next cycle begins. Within a bucket batches run on across its epoch edges.
    """

    batches: tuple[int, ...]
    """Batches per epoch of each bucket."""
    seed: int = 0

    def at(self, batch: int) -> tuple[int, int]:
        """The bucket of a batch, and how many batches came from that bucket before."""
        if len(self.batches) == 1:
            return 0, batch
        cycle, place = divmod(batch, sum(self.batches))
        buckets, before = _cycle(self.batches, self.seed, cycle)
        bucket = int(buckets[place])
        return bucket, cycle * self.batches[bucket] + int(before[place])


@dataclass(frozen=True, kw_only=True)
class RowSchedule:
    """As `BucketSchedule`, with every row of all buckets equally often, however few rows a bucket has.

    By the end of cycle c a bucket of r rows has given floor((c + 1) * r / batch) batches: less than one below its share
    of what was drawn. A bucket with fewer rows than a batch sits out cycles, in place of being repeated in each.
    """

    rows: tuple[int, ...]
    """Training rows of each bucket."""
    batch: int
    """Rows of a batch."""
    seed: int = 0

    def at(self, batch: int) -> tuple[int, int]:
        """The bucket of a batch, and how many batches came from that bucket before."""
        low, high = 0, batch * self.batch // sum(self.rows) + len(self.rows) * self.batch + 1
        while high - low > 1:  # the last cycle that begins with this batch or before it
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self._before(middle)) <= batch else (low, middle)
        before = self._before(low)
        batches = tuple(end - start for start, end in zip(before, self._before(low + 1), strict=True))
        buckets, earlier = _cycle(batches, self.seed, low)
        place = batch - sum(before)
        bucket = int(buckets[place])
        return bucket, before[bucket] + int(earlier[place])

    def _before(self, cycle: int) -> tuple[int, ...]:
        """Batches that each bucket has given before a cycle."""
        return tuple(cycle * rows // self.batch for rows in self.rows)
