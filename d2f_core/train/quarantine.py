"""Rows that a training could not use: collected, shared between workers, stored in checkpoints, limited in number."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from d2f_core.data.stream_plan import StreamPlan


class QuarantineLimitError(ValueError):
    """More rows are unusable than the configuration allows."""


class TrainingQuarantine:
    """All workers' unusable rows with their reasons, each row once even if it was read several times."""

    def __init__(self, known: Mapping[int, str], num_rows: int, max_share: float) -> None:
        self._known, self._new = dict(known), dict[int, str]()
        self._num_rows, self._max_share = num_rows, max_share

    @classmethod
    def restored(cls, state: Mapping[str, Any], plan: StreamPlan, max_share: float) -> "TrainingQuarantine":
        return cls({int(row): reason for row, reason in state.get("quarantined", [])}, plan.num_samples, max_share)

    def add(self, unusable: tuple[tuple[int, str], ...]) -> None:
        self._new.update((row, reason) for row, reason in unusable if row not in self._known)

    def rows(self) -> list[tuple[int, str]]:
        """(row, reason), sorted."""
        return sorted(self._known.items())

    def exchange(self, device: Any) -> int:
        """Exchange rows with the other workers, and return the total of unusable rows; every worker must call this.

        Raises:
            QuarantineLimitError: too many rows are unusable; raised on every worker at once.
        """
        flag = torch.tensor([len(self._new)], device=device)
        dist.all_reduce(flag)
        if not flag.item():
            return len(self._known)
        parts: list[dict[int, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self._new)
        for part in parts:
            self._known.update(part or {})
        self._new.clear()
        if len(self._known) > self._max_share * self._num_rows:
            shown = "; ".join(f"row {row}: {reason}" for row, reason in self.rows()[:3])
            raise QuarantineLimitError(
                f"{len(self._known)} of {self._num_rows} rows are unusable, more than max_quarantined_share="
                f"{self._max_share:g} allows ({shown}). Write the table again, or raise the limit."
            )
        return len(self._known)
