"""MLflow's address, its limits and its refusals, without a server."""

import contextlib
import os
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from d2f_core import retry
from d2f_core.tracking import TrackingError, check_tracking, server
from d2f_core.tracking.server import (
    PROXY_MULTIPART,
    REQUEST_TIMEOUT,
    UnreachableTrackingError,
    attempt,
    attempt_upload,
    client_for,
)


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


class Mlflow(ThreadingHTTPServer):
    """Answers a search by an empty list, unless it `refuses`."""

    daemon_threads = True

    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.refuses: tuple[int, str] | None = None
        self.requests: list[str] = []
        self.scheme = "https" if certificate else "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Mlflow

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.requests.append(self.path)
        status, body = self.server.refuses or (200, "{}")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@contextlib.contextmanager
def serving(server: Mlflow) -> Iterator[Mlflow]:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def mlflow_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mlflow]:
    with serving(Mlflow()) as running:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", running.url)
        yield running


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and its own certificate for 127.0.0.1, as a house without a public authority makes them."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("certificate") / "server.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(private + made.public_bytes(Encoding.PEM))
    return file


def test_a_certificate_of_ones_own_is_honoured(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Mlflow(certificate)) as running:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", running.url)
        with pytest.raises(TrackingError, match="MLFLOW_TRACKING_SERVER_CERT_PATH"):
            check_tracking()
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
        assert check_tracking() == running.url


def test_the_clock_starts_after_the_imports(mlflow_server: Mlflow, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine they take longer than a server may."""
    real = server.client_for

    def slow(uri: str) -> object:
        time.sleep(1.0)
        return real(uri)

    monkeypatch.setattr(server, "client_for", slow)
    monkeypatch.setattr(server, "CHECK_SECONDS", 0.9)
    assert check_tracking() == mlflow_server.url
    assert mlflow_server.requests == ["/api/2.0/mlflow/experiments/search"], "as later requests go, and no other"


def test_a_server_that_does_not_know_its_name_is_told_how_to_learn_it(mlflow_server: Mlflow) -> None:
    from mlflow.server.security_utils import INVALID_HOST_MSG

    mlflow_server.refuses = (403, INVALID_HOST_MSG)
    flag = f"--allowed-hosts 127.0.0.1:{mlflow_server.server_port}"
    with pytest.raises(TrackingError, match=flag) as caught:
        check_tracking()
    assert not isinstance(caught.value, UnreachableTrackingError) and "\n" not in str(caught.value)
    client = client_for(mlflow_server.url)
    with pytest.raises(TrackingError, match=flag):
        attempt("read the run", lambda: client.get_run("1"))


@pytest.mark.usefixtures("plain_environment")
@pytest.mark.parametrize(
    ("status", "kind"), [(403, TrackingError), (413, TrackingError), (503, UnreachableTrackingError)]
)
def test_a_file_that_the_server_refuses_is_not_sent_again(
    status: int, kind: type[Exception], mlflow_server: Mlflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository

    monkeypatch.setattr(server, "RETRY_SECONDS", 0.1)
    mlflow_server.refuses = (status, "no")
    (tmp_path / "a").write_bytes(b"1")
    files = HttpArtifactRepository(f"{mlflow_server.url}/api/2.0/mlflow-artifacts/artifacts/x")
    client_for(mlflow_server.url)
    with pytest.raises(TrackingError) as caught:
        attempt_upload("log a", lambda: files.log_artifact(str(tmp_path / "a")))
    assert type(caught.value) is kind
    assert (len(mlflow_server.requests) == 1) == (kind is TrackingError)
