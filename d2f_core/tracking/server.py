"""The MLflow server: its address, whether it answers, and how long requests are retried."""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import requests

from d2f_core import s3
from d2f_core.retry import (
    GaveUpError,
    UnreachableError,
    is_credential_trouble,
    is_network_trouble,
    keep_trying,
    one_line,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHECK_SECONDS = 8.0
RETRY_SECONDS = 60.0
"""How long a request that MLflow does not answer is repeated, from its first failure on; then the error is raised."""
UPLOAD_SECONDS = 1800
"""Of silence after a file was sent, in place of MLflow's 120: a server that keeps artifacts on S3 answers when its own
copy is there."""
REQUEST_TIMEOUT, PROXY_MULTIPART = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD"
TRANSIENT = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}

INVALID_HOST = "Invalid Host header"
"""MLflow's refusal of a name that the server does not know as its own."""

T = TypeVar("T")


class TrackingError(ValueError):
    """MLflow cannot be used, or refused a request; the message is one line with the value, the rule and the fix."""


class UnreachableTrackingError(TrackingError, UnreachableError):
    """MLflow was away for longer than repetitions bridge."""


def tracking_uri() -> str:
    """The server's address.

    Raises:
        TrackingError: it is not set (MLflow would then write a database into the current directory), or it holds what
            must stay secret.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    if not uri:
        raise TrackingError(
            "MLFLOW_TRACKING_URI is not set. It must name an MLflow server, e.g. http://127.0.0.1:5000; set it."
        )
    if "@" in uri or "?" in uri:  # the address stands in logs, run pages and summaries
        raise TrackingError(
            "MLFLOW_TRACKING_URI holds a user, password, token or query ('@' or '?'), and the address is written into "
            "logs and runs. Take it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN."
        )
    _check_address(uri)
    return uri


def _check_address(uri: str) -> None:
    try:
        urlsplit(uri)
    except ValueError as error:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI is no address ({error}). It must be one such as http://127.0.0.1:5000; correct it."
        ) from None


def client_for(uri: str) -> "MlflowClient":
    """A client of the server at `uri`, for tracking and registry alike."""
    # MLflow's own retries are silent and last four minutes per call; the loop in `attempt` logs what it waits for.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault(PROXY_MULTIPART, "true")  # files from 500 MB on go to S3 in parts, past the server
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def is_away(error: BaseException) -> bool:
    """Whether the same request may succeed later, because the server or its artifact storage is unavailable."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in TRANSIENT
    if isinstance(error, requests.HTTPError) and error.response is not None:  # of files, through the server
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    return isinstance(error, requests.RequestException) or is_network_trouble(error) or is_credential_trouble(error)


def _patience(error: Exception, seconds: float | None) -> float:
    if is_credential_trouble(error):  # where artifacts go to S3 past the server
        _forget_s3_clients()
        return s3.credential_seconds()
    return (RETRY_SECONDS if seconds is None else seconds) if is_away(error) else 0.0


def _forget_s3_clients() -> None:
    """MLflow keeps its clients for five minutes, also one that found no credentials."""
    from mlflow.store.artifact import s3_artifact_repo

    s3_artifact_repo._cached_get_s3_client.cache_clear()


def attempt(what: str, call: Callable[[], T], *, seconds: float | None = None) -> T:
    """Call, and call again for `seconds` (None: `RETRY_SECONDS`) while the server does not answer.

    Raises:
        TrackingError: the server refuses, at once.
        UnreachableTrackingError: it cannot be reached for all that time.
    """
    from mlflow.exceptions import MlflowException

    try:
        return keep_trying(what, call, patience=lambda error: _patience(error, seconds))
    except GaveUpError as error:
        raise UnreachableTrackingError(
            f"MLflow {error}. Check that the server is up; the same command goes on from there."
        ) from error.__cause__
    except (MlflowException, requests.HTTPError) as error:
        raise TrackingError(f"MLflow refused to {what}: {_refusal(error)}") from error


def _refusal(error: Exception) -> str:
    """What the server says, and what to do where that does not tell."""
    if INVALID_HOST not in str(error):
        return one_line(error)
    host = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "")).netloc
    return (
        f"{one_line(error)}. The server answers to the names alone that it was started with: start it with `mlflow "
        f"server --allowed-hosts {host or 'HOST'}` (a list with commas; MLFLOW_SERVER_ALLOWED_HOSTS likewise)"
    )


def attempt_upload(what: str, call: Callable[[], T]) -> T:
    """`attempt` for files, with time for the server's own copy of what it is sent."""

    def send() -> T:
        try:
            with _time_for_uploads():
                return call()
        except Exception:
            # Whoever reaches the server alone, and not the bucket behind it, cannot send parts there.
            os.environ[PROXY_MULTIPART] = "false"
            raise

    return attempt(what, send)


@contextlib.contextmanager
def _time_for_uploads() -> Iterator[None]:
    """Longer requests of this process while the context lasts, unless the environment sets their time."""
    if REQUEST_TIMEOUT in os.environ:
        yield
        return
    os.environ[REQUEST_TIMEOUT] = str(UPLOAD_SECONDS)
    try:
        yield
    finally:
        os.environ.pop(REQUEST_TIMEOUT, None)


def check_tracking() -> str:
    """Refuse an unusable server before any work starts, within 10 seconds; returns its address.

    It is asked as every later request asks it: with the environment's certificates, user and token.

    Raises:
        UnreachableTrackingError: nothing answers there.
        TrackingError: MLFLOW_TRACKING_URI is unset, or the server refuses a read.
    """
    uri = tracking_uri()
    fix = (
        "Start the server, or correct MLFLOW_TRACKING_URI (MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN, and "
        "MLFLOW_TRACKING_SERVER_CERT_PATH for a certificate of one's own)."
    )
    client = client_for(uri)  # importing MLflow takes seconds of a busy processor, which are no silence of the server's
    answered, error = _within(CHECK_SECONDS, lambda: client.search_experiments(max_results=1))
    if not answered:
        raise UnreachableTrackingError(f"MLFLOW_TRACKING_URI={uri!r} gave no answer in {CHECK_SECONDS:.0f} s. {fix}")
    if error is not None and is_away(error):
        raise UnreachableTrackingError(f"MLFLOW_TRACKING_URI={uri!r} does not answer ({one_line(error)}). {fix}")
    if error is not None:
        raise TrackingError(f"MLFLOW_TRACKING_URI={uri!r} refused a first request ({_refusal(error)}). {fix}")
    return uri


def _within(seconds: float, call: Callable[[], object]) -> tuple[bool, Exception | None]:
    """Whether `call` ended in time, and its error."""
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            call()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # A daemon thread, so that a server which accepts and never answers does not hold up the exit either.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(outcome), outcome[0] if outcome else None


def tag_equals(tag: str, value: str) -> str:
    """MLflow search filter for one tag."""
    if "'" in value:
        raise TrackingError(f"{value!r} holds a single quote, which MLflow's search cannot express. Rename it.")
    return f"tags.`{tag}` = '{value}'"


def metric_name(name: str) -> str:
    """A metric's name in MLflow: `pck@0.1` becomes `pck_at_0.1`, because only letters, digits, spaces and `_-./` are
    accepted by every server."""
    return re.sub(r"[^\w\-./ ]", "_", name.replace("@", "_at_"))
