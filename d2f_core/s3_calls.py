"""Calls to S3 that are made again, with credentials that are looked up again, and the errors that they end in."""

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from d2f_core import s3
from d2f_core.retry import (
    GaveUpError,
    UnreachableError,
    is_credential_trouble,
    is_network_trouble,
    is_shortage,
    is_wrong_checksum,
    keep_trying,
    one_line,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = 180.0
"""How long a call to S3 is repeated, from its first failure on."""


KEYS_AT_ONCE = 1000
"""Most keys that one request may delete."""

CHECK_WAY = (
    "Look for a proxy or a cache on the way to S3 that changes answers, or for another process that writes the object."
)


class StorageError(ValueError):
    """A URI that cannot be used, with the reason and the fix in one line."""


class UnreachableStorageError(StorageError, UnreachableError):
    """S3, the network to it or the credentials for it were away for longer than repetitions bridge."""


class ChecksumError(StorageError):
    """Bytes that came twice do not have the checksum that the storage has of them."""


class ShortDownloadError(StorageError):
    """Other bytes came than the storage says that there are."""


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
    looked up again for a minute where they were good before, for some seconds where they were not. Bytes that do not
    have their checksum are fetched once more over new connections.

    Args:
        what: completes "could not ...", e.g. "read s3://bucket/key".

    Raises:
        UnreachableStorageError: it failed for all that time; one line.
        ChecksumError: what came had a wrong checksum, and again.
        Exception: any other error of `call`, at once.
    """
    try:
        return _repeated(what, call)
    except Exception as error:
        if not is_wrong_checksum(error):
            raise
        logger.warning("could not %s whole (%s); once more over a new connection", what, one_line(error))
    s3.reconnect()
    try:
        return _repeated(what, call)
    except Exception as error:
        if not is_wrong_checksum(error):
            raise
        raise ChecksumError(
            f"could not {what}: what came twice has a wrong checksum ({one_line(error)}). {CHECK_WAY}"
        ) from error


def _repeated(what: str, call: Callable[[], T]) -> T:
    try:
        return keep_trying(what, renewing(call), patience=_patience)
    except GaveUpError as error:
        raise UnreachableStorageError(
            f"{error}. {_what_to_check(error.__cause__)}; the same command goes on from there."
        ) from error.__cause__


def fetched_whole(uri: str, fetch: Callable[[], T], damage: type[Exception] | tuple[type[Exception], ...]) -> T:
    """Fetch what can be checked, and once more over new connections when it turns out not to be whole.

    A proxy or cache on the way may end an answer early and leave no sign of it. A local file is not fetched again.

    Args:
        fetch: reads from `uri` and checks what came.
        damage: what it raises when something else came than was written.

    Raises:
        Exception: what the second fetch raises, or the first one when it is none of `damage`.
    """
    try:
        return fetch()
    except damage as error:
        if not _fetch_again(uri, error):
            raise
        return fetch()


def read_on(uri: str, start: Callable[[], Iterator[T]], is_damage: Callable[[Exception], bool]) -> Iterator[T]:
    """The items of a file, in order; where it cannot be read any further, it is opened once more, as `fetched_whole`.

    Args:
        start: the items from the first one on, each time the same.

    Raises:
        Exception: what reading on raises, or reading at first when that is no damage.
    """
    done, again = 0, False
    while True:
        try:
            for item in itertools.islice(start(), done, None):
                yield item
                done += 1
            return
        except Exception as error:
            if again or not is_damage(error) or not _fetch_again(uri, error):
                raise
            again = True


def _fetch_again(uri: str, error: Exception) -> bool:
    """Whether what is damaged may be whole when it comes once more; new connections are then opened for it."""
    if not uri.startswith(("s3://", "models:/")):
        return False
    logger.warning("%s: not whole (%s); fetched once more over a new connection", uri, one_line(error))
    s3.reconnect()
    return True


def download(fs: Any, path: str, copy: Path, size: int | None) -> None:
    """Download an object to a file; one that comes with another size is downloaded once more.

    Args:
        size: bytes that the storage says it has; None: not compared.

    Raises:
        ShortDownloadError: both times other bytes came.
    """

    def fetch() -> None:
        retried(f"download {path}", lambda: fs.get_file(path, str(copy)))
        if size is not None and (found := copy.stat().st_size) != size:
            raise ShortDownloadError(f"{path}: {found:,} bytes came, and it has {size:,}. {CHECK_WAY}")

    fetched_whole(f"s3://{path}", fetch, ShortDownloadError)


def remove_objects(fs: Any, path: str) -> None:
    """Delete the object `bucket/key`, and all those below `bucket/key/`; nothing when there are none.

    s3fs itself takes `*`, `?` and `[` in a path that it deletes as a pattern.

    Raises:
        StorageError: S3 keeps some of them; names the first.
    """
    bucket = path.partition("/")[0]
    # With folders, deepest first: on S3 they are no keys, and servers that keep them list them even when empty.
    found = {path, *retried(f"list s3://{path}", lambda: fs.find(path, withdirs=True))}
    keys = [key for place in sorted(found, reverse=True) if (key := place.partition("/")[2])]
    for start in range(0, len(keys), KEYS_AT_ONCE):
        chosen = {"Objects": [{"Key": key} for key in keys[start : start + KEYS_AT_ONCE]], "Quiet": True}
        answer = retried(
            f"delete s3://{path}", lambda chosen=chosen: fs.call_s3("delete_objects", Bucket=bucket, Delete=chosen)
        )
        for error in answer.get("Errors", []):
            raise StorageError(
                f"s3://{bucket}/{error.get('Key')} cannot be deleted ({error.get('Code')}: {error.get('Message')}). "
                "Allow s3:DeleteObject there, or delete it by hand."
            )


def _what_to_check(error: BaseException | None) -> str:
    if error is not None and is_credential_trouble(error):
        return (
            "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or this machine's role, and that "
            "they may use this bucket"
        )
    return f"Check that {s3.endpoint()} is up and can be reached from here"
