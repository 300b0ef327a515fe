"""This process's way to S3: one session, s3fs with time limits, and credentials that are looked up again.

fsspec and botocore are imported on first use: a process that only handles URIs needs neither.
"""

import functools
import os
import threading
import weakref
from typing import Any

READ_TIMEOUT, CONNECT_TIMEOUT = 30, 5
"""Seconds of silence after which a server counts as stalled, and seconds to connect."""
CREDENTIAL_SECONDS, FIRST_CREDENTIAL_SECONDS = 60.0, 4.0
"""How long credentials that are missing or refused are looked up again: in a process that S3 has answered with them,
and in one that it has not, where they may be wrong."""
METADATA_ATTEMPTS = "3"
"""Of botocore to ask an instance's metadata service, which refuses some when many processes start together; its own
default is 1."""


class EndpointError(ValueError):
    """AWS_ENDPOINT_URL cannot be used; one line with the rule and the fix."""


Environment = tuple[tuple[str, str], ...]

_lock = threading.Lock()
_clients: list[weakref.ref[Any]] = []
_answered: set[tuple[int, Environment]] = set()
"""Processes and environments whose credentials S3 has taken."""
_renewals = 0


def _here() -> tuple[int, Environment]:
    """A forked process, and another environment, have a session of their own."""
    return os.getpid(), tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


@functools.cache
def _session(process: int, environment: Environment) -> Any:
    """Makes clients of S3 that do not send `Expect: 100-continue`: aiohttp awaits its answer without a time limit."""
    del process, environment
    from aiobotocore.session import AioSession

    session = AioSession()
    session.register("before-call.s3", _without_expect, unique_id="d2f-without-expect")
    session.register("after-call.s3", _note, unique_id="d2f-note")
    return session


def _without_expect(params: dict[str, Any], **_: Any) -> None:
    params["headers"].pop("Expect", None)


def _note(http_response: Any, **_: Any) -> None:
    if http_response.status_code < 400:
        _answered.add(_here())


def endpoint() -> str:
    """Where S3 is, for messages.

    Raises:
        EndpointError: the address holds a user, a password or a token.
    """
    address = os.environ.get("AWS_ENDPOINT_URL", "AWS")
    if "@" in address:  # it stands in logs and errors, also in those of botocore
        raise EndpointError(
            "AWS_ENDPOINT_URL holds a user, password or token ('@'), and the address is written into logs. Take it "
            "out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    return address


def session() -> Any:
    """This process's session, for the S3 that the environment names now; it keeps the credentials that it finds.

    Raises:
        EndpointError: as by `endpoint`.
    """
    endpoint()
    os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", METADATA_ATTEMPTS)
    return _session(*_here())


def credential_seconds() -> float:
    """How long trouble with credentials is waited for: they were good before, or they may be plainly wrong."""
    return CREDENTIAL_SECONDS if _here() in _answered else FIRST_CREDENTIAL_SECONDS


def renewals() -> int:
    """How often credentials were looked up anew."""
    return _renewals


def renew(known: int) -> None:
    """Let all of this process's clients look up credentials anew: one that found none never does so by itself.

    Args:
        known: `renewals()` before the failure; when it is another by now, a thread has done it already.
    """
    global _renewals
    with _lock:
        if known != _renewals:
            return
        _renewals += 1
        _session.cache_clear()
        for client in filter(None, (reference() for reference in _clients)):
            client.session, client._s3 = session(), None


def reconnect() -> None:
    """Let all of this process's clients open new connections for what they ask from now on."""
    with _lock:
        for client in filter(None, (reference() for reference in _clients)):
            client._s3 = None


def open_s3(*, attempts: int) -> Any:
    """s3fs, which makes a failing request up to `attempts` times, silently."""
    # Listings are never cached: another process (a worker, an earlier attempt) writes the same prefix.
    return _open(attempts, CONNECT_TIMEOUT, READ_TIMEOUT, use_listings_cache=False)


def open_for_a_probe() -> Any:
    """s3fs of the caller's own that gives up within seconds."""
    return _open(1, 3, 4, skip_instance_cache=True)


def _open(attempts: int, connect_timeout: int, read_timeout: int, **options: Any) -> Any:
    import fsspec

    retries = {"total_max_attempts": attempts, "mode": "standard"}
    fs = fsspec.filesystem(
        "s3",
        session=session(),
        config_kwargs={"connect_timeout": connect_timeout, "read_timeout": read_timeout, "retries": retries},
        **options,
    )
    fs.retries = attempts
    with _lock:
        _clients[:] = [one for one in _clients if one() not in (None, fs)] + [weakref.ref(fs)]
    return fs
