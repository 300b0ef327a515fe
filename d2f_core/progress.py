"""Progress of long jobs: log lines (done, rate, remaining time), and lines for the user who waits for the job."""

import logging
import time

logger = logging.getLogger(__name__)

EVERY_SECONDS = 5.0
TOLD = ">>> "
"""Prefix of lines for the user who waits for a job; a quiet `infra.local submit` shows no other lines."""
UNDER_WAY = " ..."
"""End of a line that is completed when the work is done; the completing line begins with it."""


def tell(line: str) -> None:
    """Print a line for the user who waits for the job, on standard output."""
    print(f"{TOLD}{line}", flush=True)


class Progress:
    """Counts units of work and logs a line every few seconds; units done before this run do not count in the rate."""

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self.done_before = done
        self.started = self.last_line = time.monotonic()
        if done:
            logger.info("%s: %d of %d %s are there already", label, done, total, unit)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Units per second since the start of this run."""
        return (self.done - self.done_before) / max(self.seconds, 1e-9)

    def advance(self, units: int) -> None:
        self.done += units
        now = time.monotonic()
        if now - self.last_line >= EVERY_SECONDS or self.done >= self.total:
            self.last_line = now
            logger.info("%s", self.line())

    def line(self) -> str:
        left = (self.total - self.done) / self.rate if self.rate > 0 else 0.0
        percent = 100 * self.done // max(self.total, 1)
        done = f"{self.done}/{self.total} {self.unit} ({percent} %)"
        return f"{self.label}: {done}, {self.rate:.1f}/s, {_clock(left)} to go"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
