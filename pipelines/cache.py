r"""See which models this machine keeps, and remove those that were read longest ago.

    python -m pipelines.cache list
    python -m pipelines.cache prune --max-gb 50 --dry-run
    python -m pipelines.cache prune --max-gb 50

They lie in $D2F_CACHE/models. With D2F_CACHE_GB set on a node, its jobs keep that limit by themselves.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.cli import run_job

if TYPE_CHECKING:
    from d2f_core.cache import KeptModel


@dataclass(frozen=True, kw_only=True)
class ListCacheConfig:
    """Nothing to set."""


@dataclass(frozen=True, kw_only=True)
class PruneCacheConfig:
    max_gb: float = 0.0
    """Gigabytes that may be left; 0: all models are removed that are not in use."""
    idle_hours: float = 1.0
    """What was given to a job more recently stays, for it may be about to load it."""

    def __post_init__(self) -> None:
        for name in ("max_gb", "idle_hours"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise ValueError(f"{name}={value} must be at least 0.")


CACHE = {"list": ListCacheConfig(), "prune": PruneCacheConfig()}


def table(models: Sequence["KeptModel"], now: float) -> str:
    """One line per model, those first that were read longest ago, and the sum."""
    lines = [f"{'GB':>8}  {'last used':>12}  source"]
    for each in models:
        hours = (now - each.used) / 3600
        age = f"{hours:.1f} h ago" if hours < 48 else f"{hours / 24:.0f} days ago"
        lines.append(f"{each.size / 1e9:8.2f}  {age:>12}  {each.source or '(not noted)'}  {each.path.name[:12]}")
    return "\n".join([*lines, f"{sum(each.size for each in models) / 1e9:8.2f}  in {len(models)} models"])


def check(config: ListCacheConfig | PruneCacheConfig) -> None:
    from d2f_core.cache import kept_models, to_remove

    if isinstance(config, PruneCacheConfig):
        print("# would be removed:\n" + table(to_remove(kept_models(), config.max_gb, config.idle_hours), time.time()))


def main(config: ListCacheConfig | PruneCacheConfig) -> None:
    from d2f_core.cache import kept_models, prune

    if isinstance(config, PruneCacheConfig):
        print("removed:\n" + table(prune(None, config.max_gb, config.idle_hours), time.time()))
    else:
        print(table(kept_models(), time.time()))


if __name__ == "__main__":
    run_job("cache", CACHE, main, check)
