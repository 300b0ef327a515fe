"""MLflow's address, its limits and its refusals, without a server."""

import os

import pytest

from d2f_core import retry
from d2f_core.tracking.server import PROXY_MULTIPART, REQUEST_TIMEOUT, attempt_upload, client_for


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables that a client sets by itself."""
    for name in (PROXY_MULTIPART, REQUEST_TIMEOUT):
        monkeypatch.setenv(name, "")  # put back at the end, whatever was made of it
        monkeypatch.delenv(name)
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)


@pytest.mark.usefixtures("plain_environment")
def test_an_upload_has_time_goes_in_parts_and_the_next_time_through_the_server() -> None:
    client_for("http://127.0.0.1:1")
    seen = []

    def upload() -> str:
        seen.append((os.environ.get(REQUEST_TIMEOUT), os.environ[PROXY_MULTIPART]))
        if len(seen) == 1:
            raise ConnectionResetError("the bucket is not reached from here")
        return "there"

    assert attempt_upload("upload the model", upload) == "there"
    assert seen == [("1800", "true"), ("1800", "false")]
    assert REQUEST_TIMEOUT not in os.environ, "other requests keep MLflow's own"


@pytest.mark.usefixtures("plain_environment")
def test_limits_that_the_environment_sets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUEST_TIMEOUT, "77")
    monkeypatch.setenv(PROXY_MULTIPART, "false")
    client_for("http://127.0.0.1:1")
    assert attempt_upload("upload", lambda: (os.environ[REQUEST_TIMEOUT], os.environ[PROXY_MULTIPART])) == (
        "77",
        "false",
    )
