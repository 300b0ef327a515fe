"""This process's way to S3: one session, and s3fs with time limits.

fsspec and botocore are imported when they are first used: a process that only names places needs neither.
"""

import functools
import os
from typing import Any

READ_TIMEOUT, CONNECT_TIMEOUT = 30, 5
"""Seconds of silence after which a server counts as stalled, and seconds to connect."""


@functools.cache
def _session(process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    """Makes clients of S3 that do not send `Expect: 100-continue`: aiohttp awaits its answer without a time limit."""
    del process, environment  # a forked process makes its own; a session keeps the credentials that it found first
    from aiobotocore.session import AioSession

    session = AioSession()
    session.register("before-call.s3", _without_expect, unique_id="d2f-without-expect")
    return session


def _without_expect(params: dict[str, Any], **_: Any) -> None:
    params["headers"].pop("Expect", None)


def session() -> Any:
    """This process's session, for the S3 that the environment names now."""
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _session(os.getpid(), environment)


def open_s3(*, attempts: int) -> Any:
    """s3fs, which makes a failing request up to `attempts` times, silently."""
    import fsspec

    # Listings are never cached: another process (a worker, an earlier attempt) writes the same prefix.
    retries = {"total_max_attempts": attempts, "mode": "standard"}
    fs = fsspec.filesystem(
        "s3",
        use_listings_cache=False,
        session=session(),
        config_kwargs={"connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT, "retries": retries},
    )
    fs.retries = attempts
    return fs
