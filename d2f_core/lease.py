"""One process at a time, on any machine: a lease, which is an object on S3 or a local file.

    with lease("s3://bucket/leases/m.json", "promote m@champion to version 3") as held:
        held.check()    # before each request that nobody else may make meanwhile
        ...

A holder renews its lease every few seconds by a thread, and frees it at the end. One that died renews it no more: a
process that has seen the object unchanged for `stale` seconds of its own clock takes it over; clocks of two machines
are never compared. All of this is done by compare and swap, so that of several processes one wins.

A holder whose renewals are not confirmed for half of that time does nothing more (`check`), so that what it had begun
has the other half to arrive. A request that the network holds back for longer is not prevented. A machine that sleeps
counts these seconds too, on Linux: when it wakes up, its holder is not certain any more.
"""

import contextlib
import json
import logging
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from d2f_core.compare_and_swap import Stored, read, swap
from d2f_core.retry import UnreachableError, one_line

logger = logging.getLogger(__name__)

JITTER = random.SystemRandom()
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Linux's monotonic clock stands still while the machine sleeps, the other one does not."""


@dataclass(frozen=True, kw_only=True)
class LeaseTimes:
    """Seconds; the same for all processes that share a lease."""

    renew: float = 4.0
    """Between two renewals."""
    stale: float = 20.0
    """After which a lease that is not renewed is taken over."""
    confirm: float = 60.0
    """For which a holder waits until its renewals are confirmed again, before it gives up."""
    wait: float = 300.0
    """For which a lease is waited for that another process holds."""


TIMES = LeaseTimes()


class LeaseError(ValueError):
    """The lease is held by another process for too long, or cannot be kept at its place; names both and the fix."""


class LeaseLostError(LeaseError, UnreachableError):
    """The lease was lost while it was held: what was under way may be done or not."""


class Lease:
    """A lease that this process holds; `lease` makes it."""

    def __init__(self, uri: str, record: dict[str, Any], tag: str, confirmed: float, times: LeaseTimes) -> None:
        self.uri = uri
        self._record, self._tag, self._confirmed, self._times = record, tag, confirmed, times
        self._lost = False
        self._ended, self._renewed = threading.Event(), threading.Condition()
        self._thread = threading.Thread(target=self._renew_until_ended, name=f"lease {uri}", daemon=True)

    def check(self) -> None:
        """Return if nobody else can hold the lease within the next `stale / 2` seconds.

        Raises:
            LeaseLostError: another process has taken it over, or its storage confirms no renewal any more.
        """
        with self._renewed:
            self._renewed.wait_for(lambda: self._lost or self._is_certain(), self._times.confirm)
            if self._lost or not self._is_certain():
                why = "another process has taken it over" if self._lost else "its storage confirms no renewal"
                raise LeaseLostError(f"the lease {self.uri} was lost: {why}. The same command goes on from there.")

    def _is_certain(self) -> bool:
        return _now() - self._confirmed <= self._times.stale / 2

    def _renew_until_ended(self) -> None:
        while not self._lost and not self._ended.wait(self._times.renew):
            try:
                self._write({"beat": self._record["beat"] + 1})
            except (ValueError, OSError) as error:
                logger.warning("the lease %s was not renewed: %s", self.uri, one_line(error))

    def _write(self, changes: dict[str, Any]) -> None:
        """Raises ValueError or OSError when its storage cannot be used."""
        record, asked = {**self._record, **changes}, _now()
        tag = swap(self.uri, _encode(record), self._tag)
        with self._renewed:
            self._lost = tag is None
            if tag is not None:
                # From before the request on: whoever saw the object after it has waited for less.
                self._record, self._tag, self._confirmed = record, tag, asked
            self._renewed.notify_all()

    def start(self) -> None:
        """Begin to renew it."""
        self._thread.start()

    def release(self) -> None:
        """Free the lease if it is still this process's; what fails here is made up by a takeover."""
        self._ended.set()
        self._thread.join(self._times.stale)
        if self._lost or self._thread.is_alive():
            logger.warning("the lease %s is not this process's any more; it is left alone", self.uri)
            return
        try:
            self._write({"free": True})
        except (ValueError, OSError) as error:
            logger.warning("the lease %s stays until it is taken over: %s", self.uri, one_line(error))


@contextlib.contextmanager
def lease(uri: str, purpose: str, *, times: LeaseTimes | None = None) -> Iterator[Lease]:
    """Hold the lease at an s3:// URI or a local path while the context lasts.

    Args:
        purpose: shown to whoever waits for it.
        times: None: `TIMES`.

    Raises:
        LeaseError: another process renews it for longer than is waited, or it cannot be written there.
        UnreachableStorageError: S3 stays unavailable.
    """
    try:
        held = _acquire(uri, purpose, times or TIMES)
    except OSError as error:
        raise unwritable(f"the lease {uri}", error) from error
    held.start()
    try:
        yield held
    finally:
        held.release()


def unwritable(what: str, error: OSError) -> LeaseError:
    """The error of a place that cannot be used."""
    return LeaseError(
        f"{what} cannot be written ({one_line(error)}). Give leases a directory, s3:// or local, that all jobs of this "
        "model may write to."
    )


def _now() -> float:
    return time.clock_gettime(CLOCK)


def _acquire(uri: str, purpose: str, times: LeaseTimes) -> Lease:
    deadline, seen, since = _now() + times.wait, None, 0.0
    record = {
        "holder": f"{socket.gethostname()} process {os.getpid()}", "purpose": purpose, "free": False, "beat": 0,
        "token": secrets.token_hex(8), "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    while True:
        asked = _now()
        there = read(uri)
        if there and there.tag != (seen and seen.tag):
            if seen is None and not _is_free(there):
                logger.info("waiting for the lease %s: %s holds it", uri, _holder(there))
            seen, since = there, _now()
        dead = there is not None and not _is_free(there) and asked - since >= times.stale
        if there is None or _is_free(there) or dead:
            asked = _now()
            if tag := swap(uri, _encode(record), there and there.tag):
                if dead and there:
                    logger.warning(
                        "took over the lease %s: %s did not renew it for %.0f s", uri, _holder(there), times.stale
                    )
                return Lease(uri, record, tag, asked, times)
        elif asked > deadline:
            raise LeaseError(
                f"the lease {uri} was held for {times.wait:.0f} s: {_holder(there)}. Let that end, or end it; the same "
                "command goes on from there."
            )
        time.sleep(JITTER.uniform(0.5, 1.0) * min(1.0, times.renew / 2))


def _encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1).encode()


def _decode(stored: Stored) -> dict[str, Any]:
    try:
        return dict(json.loads(stored.data))
    except (ValueError, TypeError):
        return {}  # of nobody who renews it


def _is_free(stored: Stored) -> bool:
    return _decode(stored).get("free") is True


def _holder(stored: Stored) -> str:
    record = _decode(stored)
    return f"{record.get('holder', 'somebody')} ({record.get('purpose', 'unknown')}, since {record.get('since', '?')})"
