"""S3 access of this process: one session, and s3fs with timeouts.

fsspec and botocore are imported on first use: a process that only handles URIs needs neither.
"""

import functools
import os
from typing import Any

READ_TIMEOUT, CONNECT_TIMEOUT = 30, 5
"""Timeouts in seconds: without data from the server, and for connecting."""


@functools.cache
def _session(process: int, environment: tuple[tuple[str, str], ...]) -> Any:
    """A session whose S3 clients do not send `Expect: 100-continue`, for whose response aiohttp waits without a
    timeout.
    """
    del process, environment  # cache keys: a session is not fork-safe, and keeps its first credentials
    from aiobotocore.session import AioSession

    session = AioSession()
    session.register("before-call.s3", _without_expect, unique_id="d2f-without-expect")
    return session


def _without_expect(params: dict[str, Any], **_: Any) -> None:
    params["headers"].pop("Expect", None)


def session() -> Any:
    """This process's session for the S3 settings in the environment."""
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _session(os.getpid(), environment)


def open_s3(*, attempts: int) -> Any:
    """An s3fs filesystem that silently makes up to `attempts` attempts per request."""
    import fsspec

    # Listings are not cached, because other processes (a worker, an earlier attempt) write to the same prefix.
    retries = {"total_max_attempts": attempts, "mode": "standard"}
    fs = fsspec.filesystem(
        "s3",
        use_listings_cache=False,
        session=session(),
        config_kwargs={"connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT, "retries": retries},
    )
    fs.retries = attempts
    return fs
