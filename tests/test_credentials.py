"""Credentials that a machine's role lends are away for a while: an instance's metadata service stands in a thread."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from botocore.exceptions import CredentialRetrievalError, MetadataRetrievalError, NoCredentialsError

from d2f_core import s3, storage
from d2f_core.retry import is_credential_trouble, is_network_trouble
from d2f_core.storage import StorageError, UnreachableStorageError
from tests.stub_aws import StubMetadata, StubS3, serving

URI = "s3://there/a"
ALWAYS = 10**6


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[StubS3]:
    """Named by the environment, with `a` in it."""
    caplog.set_level(logging.WARNING)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = StubS3()
    server.objects["a"] = b"1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    with serving(server):
        yield server


@pytest.fixture
def metadata(bucket: StubS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubMetadata]:
    """The service that lends credentials for `bucket`."""
    server = StubMetadata()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.url)
    with serving(server):
        yield server


def read_by_arrow() -> bytes:
    fs, path = storage.arrow_filesystem(URI)
    return storage.retried("read it", lambda: fs.open_input_file(path).read())


@pytest.mark.parametrize("read", [lambda: storage.read_bytes(URI), read_by_arrow])
def test_a_service_that_is_away_at_the_start_is_asked_again(
    read: Callable[[], bytes], metadata: StubMetadata, caplog: pytest.LogCaptureFixture
) -> None:
    metadata.away = 12
    assert read() == b"1"
    assert "again in" in caplog.text and metadata.away == 0


def test_more_than_one_attempt_is_made_before_that(metadata: StubMetadata, caplog: pytest.LogCaptureFixture) -> None:
    metadata.away = 2
    assert storage.read_bytes(URI) == b"1" and "again in" not in caplog.text


@pytest.mark.usefixtures("bucket")
def test_credentials_that_were_good_are_waited_for_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "K")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S")
    assert s3.credential_seconds() == s3.FIRST_CREDENTIAL_SECONDS
    assert storage.read_bytes(URI) == b"1"
    assert s3.credential_seconds() == s3.CREDENTIAL_SECONDS == 60
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert s3.credential_seconds() == s3.FIRST_CREDENTIAL_SECONDS


def test_an_expired_token_is_looked_up_anew(bucket: StubS3, metadata: StubMetadata) -> None:
    assert storage.read_bytes(URI) == b"1"
    asked = len(metadata.requests)
    bucket.refusals = ["ExpiredToken"]
    assert storage.read_bytes(URI) == b"1"
    assert any("security-credentials/role" in request for request in metadata.requests[asked:])
    storage.write_bytes("s3://there/b", b"2")
    bucket.refusals = ["ExpiredToken"]  # a HEAD's answer has no body that could say so
    assert storage.exists("s3://there/b")


@pytest.mark.parametrize("call", [lambda: storage.read_bytes(URI), lambda: storage.check_reachable(URI)])
def test_without_credentials_it_ends_within_seconds(call: Callable[[], object], metadata: StubMetadata) -> None:
    metadata.away = ALWAYS
    began = time.monotonic()
    with pytest.raises(UnreachableStorageError, match=r"Unable to locate credentials.*AWS_ACCESS_KEY_ID") as caught:
        call()
    assert time.monotonic() - began < 12 and "\n" not in str(caught.value)


@pytest.mark.usefixtures("metadata")
def test_a_missing_right_is_an_error_at_once(bucket: StubS3, caplog: pytest.LogCaptureFixture) -> None:
    bucket.allowed = "team/"
    with pytest.raises(PermissionError):
        storage.read_bytes(URI)
    with pytest.raises(StorageError, match="is not readable at") as caught:
        storage.check_reachable(URI)
    assert not isinstance(caught.value, UnreachableStorageError) and "again in" not in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        NoCredentialsError(),
        CredentialRetrievalError(provider="iam-role", error_msg="away"),
        MetadataRetrievalError(error_msg="away"),
        RuntimeError("Credentials were refreshed, but the refreshed credentials are still expired."),
        OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
        OSError("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body."),
        OSError("AWS Error UNKNOWN (HTTP status 400) during GetObject operation: ExceptionName: ExpiredToken"),
    ],
)
def test_trouble_with_credentials_is_known(error: Exception) -> None:
    assert is_credential_trouble(error) and not is_network_trouble(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("another"),
        UnreachableStorageError("gave up"),
        PermissionError("of a file"),
        OSError("AWS Error UNKNOWN (HTTP status 400) during PutObject operation"),
    ],
)
def test_other_errors_are_no_trouble_with_credentials(error: Exception) -> None:
    assert not is_credential_trouble(error)


@pytest.mark.usefixtures("metadata")
def test_a_place_is_checked_below_its_prefix_and_for_one_key(bucket: StubS3) -> None:
    bucket.allowed = "team/runs/"
    storage.check_reachable("s3://there/team/runs", write=True)
    (listing,) = [request for request in bucket.requests if request.startswith("GET /there?")]
    assert "prefix=team%2Fruns%2F" in listing and "max-keys=1" in listing
    assert [request for request in bucket.requests if "PUT" in request] == ["PUT /there/team/runs/.writable"]
    assert "team/runs/.writable" not in bucket.objects, "it was taken away again"
    with pytest.raises(StorageError, match="is not readable at"):
        storage.check_reachable("s3://there/team/other")


@pytest.mark.usefixtures("metadata")
def test_a_misspelt_bucket_is_refused_and_not_made(bucket: StubS3) -> None:
    with pytest.raises(StorageError, match="no bucket 'their' at"):
        storage.check_reachable("s3://their/team", write=True)
    assert not [request for request in bucket.requests if "PUT" in request]
