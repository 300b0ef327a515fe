"""Run a stage of a workflow once: a stage that is complete for the same config and inputs is skipped, with a log line.

A stage that completes leaves one small JSON record with its key, counts and outputs. The record is written last, so a
killed stage has none and runs again; making that second run cheap (resume, no-op) is left to the stage.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from d2f_core.progress import UNDER_WAY, tell
from d2f_core.storage import read_bytes, write_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageOutcome:
    """Return value of a stage's function: how much it made, and the outputs that later stages need."""

    count: int
    """Rows or steps in the complete output, including those of earlier attempts."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """JSON values, e.g. URI, digest, model version."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """One line of the workflow's summary."""

    name: str
    unit: str
    count: int
    seconds: float
    """Wall time of the attempt that completed the stage."""
    skipped: bool
    outputs: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        rate = self.count / self.seconds if self.seconds > 0 else 0.0
        return {
            "name": self.name,
            "rows_or_steps": self.count,
            "unit": self.unit,
            "seconds": round(self.seconds, 2),
            "rate": round(rate, 2),
            "skipped": self.skipped,
        }


def run_stage(
    name: str,
    *,
    record_uri: str,
    key: str,
    unit: str,
    run: Callable[[], StageOutcome],
    still_there: Callable[[dict[str, Any]], bool],
    told: str = "",
) -> StageResult:
    """Run the stage, or skip it when `record_uri` says that it completed with the same key.

    Args:
        still_there: predicate on the recorded outputs: whether they still exist unchanged; if not, the stage runs
            again.
        told: description of the stage in lines for the waiting user; empty: its name.
    """
    told = told or name
    record = _read_record(record_uri)
    if record is not None and record["key"] == key:
        if still_there(record["outputs"]):
            logger.info("%s: complete (%d %s), skipped", name, record["count"], unit)
            tell(f"{told}: complete before")
            return _result(name, unit, record, skipped=True)
        logger.warning("%s: recorded as complete, but its output is gone or changed; running it again", name)
    elif record is not None:
        logger.info("%s: its config or inputs changed since it last completed; running it again", name)
    logger.info("%s: starting", name)
    tell(f"{told}{UNDER_WAY}")
    started = time.monotonic()
    outcome = run()
    seconds = time.monotonic() - started
    record = {"key": key, "count": outcome.count, "unit": unit, "seconds": seconds, "outputs": outcome.outputs}
    record["rate"] = outcome.count / seconds if seconds > 0 else 0.0
    write_bytes(record_uri, json.dumps(record, indent=2, sort_keys=True).encode())
    logger.info("%s: %d %s in %.1f s (%.1f/s)", name, outcome.count, unit, seconds, record["rate"])
    tell(f"{UNDER_WAY} {outcome.count:,} {unit} in {seconds:.0f} s")
    return _result(name, unit, record, skipped=False)


def _result(name: str, unit: str, record: dict[str, Any], *, skipped: bool) -> StageResult:
    return StageResult(
        name=name,
        unit=unit,
        count=record["count"],
        seconds=record["seconds"],
        skipped=skipped,
        outputs=record["outputs"],
    )


def _read_record(uri: str) -> dict[str, Any] | None:
    try:
        record = json.loads(read_bytes(uri))
    except FileNotFoundError:
        return None
    except ValueError as error:  # no JSON, or not even text
        raise ValueError(f"{uri!r} is not a stage record ({error}). Remove it; the stage then runs again.") from None
    missing = {"key", "count", "seconds", "outputs"} - set(record if isinstance(record, dict) else ())
    if missing:
        raise ValueError(f"{uri!r} is not a stage record (no {sorted(missing)}). Remove it; the stage then runs again.")
    return record
