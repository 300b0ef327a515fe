"""Calls to S3 that are made again, with credentials that are looked up again, and the errors that they end in."""

from collections.abc import Callable
from typing import TypeVar

from d2f_core import s3
from d2f_core.retry import (
    GaveUpError,
    UnreachableError,
    is_credential_trouble,
    is_network_trouble,
    is_shortage,
    keep_trying,
)

T = TypeVar("T")

RETRY_SECONDS = 180.0
"""How long a call to S3 is repeated, from its first failure on."""


class StorageError(ValueError):
    """A URI that cannot be used, with the reason and the fix in one line."""


class UnreachableStorageError(StorageError, UnreachableError):
    """S3, the network to it or the credentials for it were away for longer than repetitions bridge."""


def _patience(error: Exception) -> float:
    if is_credential_trouble(error):
        return s3.credential_seconds()
    # Memory is not waited for: pyarrow asks for absurd amounts of it when a file is damaged.
    passing = is_network_trouble(error) or (isinstance(error, OSError) and is_shortage(error))
    return RETRY_SECONDS if passing else 0.0


def renewing(call: Callable[[], T]) -> Callable[[], T]:
    """`call` for repetition: after trouble with credentials, the next one looks them up anew."""
    known: int | None = None

    def once() -> T:
        nonlocal known
        if known is not None:
            s3.renew(known)
        known, before = None, s3.renewals()
        try:
            return call()
        except Exception as error:
            known = before if is_credential_trouble(error) else None
            raise

    return once


def retried(what: str, call: Callable[[], T]) -> T:
    """Call, and call again while the network or S3 is in trouble, for `RETRY_SECONDS`; for s3fs and pyarrow alike.

    A machine that is short of open files is such trouble, too. Credentials that are away or have expired are
    looked up again for a minute where they were good before, for some seconds where they were not.

    Args:
        what: completes "could not ...", e.g. "read s3://bucket/key".

    Raises:
        UnreachableStorageError: it failed for all that time; one line.
        Exception: any other error of `call`, at once.
    """
    try:
        return keep_trying(what, renewing(call), patience=_patience)
    except GaveUpError as error:
        raise UnreachableStorageError(
            f"{error}. {_what_to_check(error.__cause__)}; the same command goes on from there."
        ) from error.__cause__


def _what_to_check(error: BaseException | None) -> str:
    if error is not None and is_credential_trouble(error):
        return (
            "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or this machine's role, and that "
            "they may use this bucket"
        )
    return f"Check that {s3.endpoint()} is up and can be reached from here"
