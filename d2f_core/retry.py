"""Retries of calls on transient errors of the network or a server, and which errors are transient.

One loop for S3, MLflow and model hubs. What is an error of the caller (a wrong secret, a missing object) is never
repeated. Credentials that a machine is lent, by its role, may be away for a while like any other server's answer.
"""

import errno
import http.client
import itertools
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_DELAY, LONGEST_DELAY = 0.5, 15.0
"""Seconds before the second attempt, and at most between two."""
LEAST_ATTEMPTS = 3
"""However long each of them takes."""
# Not the global generator: its state belongs to whoever seeded it.
JITTER = random.SystemRandom()

TRANSIENT_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IDPCommunicationError",  # of the service that lends credentials
    "IncompleteBody",
    "InternalError",
    "NoSuchUpload",  # a multipart upload that was completed, but whose response was lost
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
"""S3's error codes that a repeated request may not meet again; beside them every status 5xx but 501, 408 and 429."""
EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
"""S3's codes for credentials that were good: others may be there by now."""
REFUSALS = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError)
"""Errors that are never retried; ValueError stands for this project's own errors, some of them raised after such a loop
has given up."""
NETWORK_ERRNOS = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EPIPE}
SHORTAGE_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN}
# pyarrow raises OSError with the text of the AWS SDK. libcurl: 5, 6 name; 7 connect; 16, 92 HTTP/2; 18 partial;
# 28 timeout; 35 TLS connect; 52 empty answer; 55, 56 send and receive.
ARROW_TRANSIENT = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|THROTTLING|REQUEST_TIMEOUT)\b"
    r"|AWS Error .*HTTP status (5(?!01)\d\d|408|429)\b"
    r"|curlCode: (5|6|7|16|18|28|35|52|55|56|92)\b"
)


# pyarrow's SDK asks without a signature when it finds no credentials. A HEAD has no body: its 400 is an expired token.
ARROW_CREDENTIALS = re.compile(
    r"AWS Error (ACCESS_DENIED|REQUEST_EXPIRED|MISSING_AUTHENTICATION_TOKEN)\b|ExpiredToken"
    r"|AWS Error .*HTTP status 400\) during Head"
)


class UnreachableError(Exception):
    """A server, or the network to it, was away for longer than repetitions bridge: the same call may succeed later."""


class GaveUpError(Exception):
    """A call still failed when its time was up; the last error is `__cause__`."""

    def __init__(self, what: str, attempts: int, seconds: float, reason: str) -> None:
        super().__init__(f"could not {what} in {attempts} attempts over {seconds:.0f} s: {reason}")
        self.attempts, self.seconds, self.reason = attempts, seconds, reason


def one_line(error: BaseException, limit: int = 300) -> str:
    """The error's text without line breaks, or its type if the text is empty."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def delays() -> Iterator[float]:
    """Seconds before each further attempt: exponential backoff with jitter, so that workers do not retry in step."""
    for number in itertools.count():
        longest = min(FIRST_DELAY * 2 ** min(number, 10), LONGEST_DELAY)
        yield JITTER.uniform(longest / 2, longest)


def keep_trying(what: str, call: Callable[[], T], *, patience: Callable[[Exception], float]) -> T:
    """Call, and call again while it fails with an error that may pass; each repetition is one warning in the log.

    Args:
        what: completes "could not ...".
        patience: of an error, for how many seconds after the first failure new attempts begin, `LEAST_ATTEMPTS` in any
            case; 0 for one that is raised at once. A call that hangs is bounded by its own time limits, not by this.

    Raises:
        GaveUpError: the last attempt failed as well.
        Exception: whatever `call` raises and `patience` gives no time.
    """
    began, failed = time.monotonic(), None
    for attempt, delay in enumerate(delays(), start=1):
        try:
            return call()
        except Exception as error:
            seconds = patience(error)
            if not seconds:
                raise
            now = time.monotonic()
            # Not from the beginning: a transfer that breaks after minutes would never be repeated.
            failed = now if failed is None else failed
            left = failed + seconds - now
            if left <= 0 and attempt >= LEAST_ATTEMPTS:
                raise GaveUpError(what, attempt, now - began, one_line(error)) from error
            delay = min(delay, left) if left > 0 else delay
            logger.warning(
                "could not %s (%s); again in %.1f s, for up to %.0f s more",
                what,
                one_line(error),
                delay,
                max(left, delay),
            )
        time.sleep(delay)
    raise AssertionError("unreachable")


def is_network_trouble(error: BaseException) -> bool:
    """Whether an error of s3fs, boto3, pyarrow or a socket is due to a network or server that may recover."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(answer := getattr(link, "response", None), dict):
            return _is_transient_answer(answer)
    return not isinstance(error, REFUSALS) and any(_is_trouble(link) for link in chain)


def is_credential_trouble(error: BaseException) -> bool:
    """Whether credentials could not be found or were good until now; never a wrong key, secret or permission.

    pyarrow's ACCESS_DENIED is one, too, for it does not tell missing credentials from missing rights.
    """
    if isinstance(error, (ValueError, FileNotFoundError)):
        return False
    return any(_is_credential_trouble(link) for link in _chain(error))


def is_shortage(error: BaseException) -> bool:
    """Whether this machine lacks memory, open files or threads for now, which says nothing about what was asked for."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in SHORTAGE_ERRNOS)


def is_wrong_checksum(error: BaseException) -> bool:
    """Whether other bytes came than the checksum in the answer's head is of; from s3fs, which checks whole objects."""
    return any("botocore.FlexibleChecksumError" in _family(link) for link in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes: s3fs translates botocore's errors, boto3 does so without setting a cause."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (link.__context__ if type(link).__module__.startswith("boto3.") else None)


def _is_transient_answer(answer: dict) -> bool:
    """Whether an S3 error response, as parsed by botocore, is transient. A HEAD has no body, so its code is the
    status.
    """
    code = str(answer.get("Error", {}).get("Code", ""))
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or int(code if code.isdigit() else 0)
    return code in TRANSIENT_CODES or (status >= 500 and status != 501) or status in (408, 429)


def _is_credential_trouble(error: BaseException) -> bool:
    if isinstance(answer := getattr(error, "response", None), dict):
        code, operation = str(answer.get("Error", {}).get("Code", "")), str(getattr(error, "operation_name", ""))
        return code in EXPIRED_CODES or (code == "400" and operation.startswith("Head"))
    if isinstance(error, OSError):
        return bool(ARROW_CREDENTIALS.search(str(error)))
    if isinstance(error, RuntimeError):  # botocore's, without a type of its own
        return "refreshed credentials are still expired" in str(error)
    return not _family(error).isdisjoint(
        {
            "botocore.CredentialRetrievalError",
            "botocore.MetadataRetrievalError",
            "botocore.NoCredentialsError",
        }
    )


def _family(error: BaseException) -> set[str]:
    """By name: whoever reads local files only has no need to import the clients of S3."""
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}


def _is_trouble(error: BaseException) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError, http.client.IncompleteRead)):
        return True
    if isinstance(error, OSError) and (error.errno in NETWORK_ERRNOS or ARROW_TRANSIENT.search(str(error))):
        return True
    family = _family(error)
    if "botocore.SSLError" in family and "certificate" in str(error).lower():
        return False
    return not family.isdisjoint(
        {
            "aiohttp.ClientError",
            "botocore.ConnectionError",
            "botocore.HTTPClientError",
            "botocore.IncompleteReadError",
            "botocore.ResponseParserError",
        }
    )
