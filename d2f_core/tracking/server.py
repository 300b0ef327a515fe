"""The MLflow server: its address, whether it answers, and how long requests are retried."""

import os
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import requests

from d2f_core.retry import GaveUpError, is_network_trouble, keep_trying, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHECK_SECONDS = 9.0
RETRY_SECONDS = 60.0
"""Seconds for which a request that MLflow does not answer is retried before the error is raised."""
TRANSIENT = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}

T = TypeVar("T")


class TrackingError(ValueError):
    """MLflow cannot be used, or refused a request; the message is one line with the value, the rule and the fix."""


def tracking_uri() -> str:
    """The server's address.

    Raises:
        TrackingError: MLFLOW_TRACKING_URI is not set (MLflow would then write a database to the current directory), is
            no address, or contains a password.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    if not uri:
        raise TrackingError(
            "MLFLOW_TRACKING_URI is not set. It must name an MLflow server, e.g. http://127.0.0.1:5000; set it."
        )
    if _password(uri) is not None:  # the address appears in logs, run pages and summaries
        raise TrackingError(
            "MLFLOW_TRACKING_URI holds a password, and the address is written into logs and runs. Take it out, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )
    return uri


def _password(uri: str) -> str | None:
    try:
        return urlsplit(uri).password
    except ValueError as error:  # the address is not shown, for it may hold a password
        raise TrackingError(
            f"MLFLOW_TRACKING_URI is no address ({error}). It must be one such as http://127.0.0.1:5000; correct it."
        ) from None


def client_for(uri: str) -> "MlflowClient":
    """A client of the server at `uri`, for tracking and registry alike."""
    # MLflow's own retries are silent and last four minutes per call; the loop in `attempt` logs what it waits for.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def is_away(error: BaseException) -> bool:
    """Whether the same request may succeed later, because the server or its artifact storage is unavailable."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in TRANSIENT
    return isinstance(error, requests.RequestException) or is_network_trouble(error)


def attempt(what: str, call: Callable[[], T]) -> T:
    """Call `call`, and retry for up to `RETRY_SECONDS` while the server does not answer.

    Raises:
        TrackingError: at once if the server refuses the request, after `RETRY_SECONDS` if it cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    try:
        return keep_trying(what, call, transient=is_away, seconds=RETRY_SECONDS)
    except GaveUpError as error:
        raise TrackingError(
            f"MLflow {error}. Check that the server is up; the same command goes on from there."
        ) from error.__cause__
    except MlflowException as error:
        raise TrackingError(f"MLflow refused to {what}: {one_line(error)}") from error


def check_tracking() -> str:
    """Refuse an unusable server before any work starts, within 10 seconds; returns its address.

    Raises:
        TrackingError: MLFLOW_TRACKING_URI is unset, nothing answers there, or it refuses a read.
    """
    uri = tracking_uri()
    fix = "Start the server, or correct MLFLOW_TRACKING_URI (and MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN)."
    if uri.startswith(("http://", "https://")):
        try:
            requests.get(f"{uri}/health", timeout=(2.0, 3.0))
        except requests.RequestException as error:
            reason = type(error).__name__
            raise TrackingError(f"MLFLOW_TRACKING_URI={uri!r} does not answer ({reason}). {fix}") from None
    outcome: list[BaseException | None] = []
    client = client_for(uri)  # here, as importing MLflow may take seconds that must not count

    def probe() -> None:
        try:
            client.search_experiments(max_results=1)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # A daemon thread, so that a server which accepts and never answers does not hold up the exit either.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(CHECK_SECONDS - 5.0)
    if not outcome:
        raise TrackingError(f"MLFLOW_TRACKING_URI={uri!r} gave no answer to a first request in time. {fix}")
    if outcome[0] is not None:
        raise TrackingError(f"MLFLOW_TRACKING_URI={uri!r} refused a first request ({one_line(outcome[0])}). {fix}")
    return uri


def tag_equals(tag: str, value: str) -> str:
    """MLflow search filter for one tag."""
    if "'" in value:
        raise TrackingError(f"{value!r} holds a single quote, which MLflow's search cannot express. Rename it.")
    return f"tags.`{tag}` = '{value}'"


def metric_name(name: str) -> str:
    """A metric's name in MLflow: `pck@0.1` becomes `pck_at_0.1`, because only letters, digits, spaces and `_-./` are
    accepted by every server."""
    return re.sub(r"[^\w\-./ ]", "_", name.replace("@", "_at_"))
