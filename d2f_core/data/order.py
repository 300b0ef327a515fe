"""The order of samples: a pure function of (seed, epoch, number of rows). Position is one integer.

Position p of a training is sample p mod N of epoch p // N, so batches run on across epoch edges: every sample is used
exactly once per epoch and nothing is dropped. Nothing here depends on the number of workers.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from d2f_core.randomness import keyed_generator


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return keyed_generator(seed, epoch, "order").permutation(count)


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    num_rows: int
    """Rows of the table."""
    holdout_rows: int = 0
    """Rows kept out of training, spread evenly over the table."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.holdout_rows < self.num_rows:
            raise ValueError(
                f"holdout_rows={self.holdout_rows} must be at least 0 and less than the table's {self.num_rows} rows."
            )

    @property
    def num_samples(self) -> int:
        """Training samples per epoch."""
        return self.num_rows - self.holdout_rows

    @property
    def _stride(self) -> int:
        return self.num_rows // self.holdout_rows if self.holdout_rows else 0

    def holdout(self) -> np.ndarray:
        """Int64 row numbers that training never sees: every stride-th row."""
        return np.arange(self.holdout_rows, dtype=np.int64) * self._stride

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and row number, int64 each, of int64 positions."""
        epochs, offsets = np.divmod(positions, self.num_samples)
        dense = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            dense[chosen] = _permutation(self.num_samples, self.seed, int(epoch))[offsets[chosen]]
        return epochs, self._row(dense)

    def _row(self, dense: np.ndarray) -> np.ndarray:
        """Training sample number -> row number: skip the held-out row at the head of each stride."""
        if not self.holdout_rows:
            return dense
        if self._stride == 1:
            return dense + self.holdout_rows
        headed = self.holdout_rows * (self._stride - 1)
        return np.where(dense < headed, dense + dense // (self._stride - 1) + 1, dense + self.holdout_rows)
