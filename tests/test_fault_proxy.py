"""The proxy that stands for a bad network, in front of a small HTTP server that counts what reaches it."""

import contextlib
import http.client
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.fault_proxy import FaultProxy

CUT = (ConnectionError, http.client.HTTPException)


class Echo(ThreadingHTTPServer):
    """PUT answers with the body it got; GET sends `first`, and `second` once `go` is set, as two chunks."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str | None]] = []
        self.go = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Echo

    def do_PUT(self) -> None:
        self.server.seen.append(("PUT", self.headers["Host"]))
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Transfer-Encoding"] == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.seen.append(("GET", self.headers["Host"]))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nfirst\r\n")
        assert self.server.go.wait(10)
        self.wfile.write(b"6\r\nsecond\r\n0\r\n\r\n")

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[FaultProxy]:
    with FaultProxy("127.0.0.1", echo.server_port) as running:
        yield running


@contextlib.contextmanager
def connected(proxy: FaultProxy) -> Iterator[http.client.HTTPConnection]:
    client = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    try:
        yield client
    finally:
        client.close()


def put(client: http.client.HTTPConnection, body: bytes = b"x", **headers: str) -> tuple[int, bytes]:
    client.request("PUT", "/key", body, headers)
    reply = client.getresponse()
    return reply.status, reply.read()


def test_many_requests_of_one_connection_pass_unchanged(proxy: FaultProxy, echo: Echo) -> None:
    big = bytes(range(256)) * 20_000
    with connected(proxy) as client:
        client.connect()
        sock = client.sock
        for body in (b"", b"one", big, b"two"):
            assert put(client, body, Host="signed.example") == (200, body)
        client.request("PUT", "/key", iter([b"in ", b"chunks"]), encode_chunked=True)
        assert client.getresponse().read() == b"in chunks"
        client.request("HEAD", "/key")
        assert client.getresponse().read() == b""
        assert put(client, b"after") == (200, b"after") and client.sock is sock, "one connection all along"
    assert echo.seen[0] == ("PUT", "signed.example") and proxy.counts == {"requests": 7}


def test_a_body_that_waits_for_100_continue_is_sent_after_it(proxy: FaultProxy) -> None:
    with connected(proxy) as client:
        client.putrequest("PUT", "/key")
        client.putheader("Content-Length", "4")
        client.putheader("Expect", "100-continue")
        client.endheaders()
        assert client.sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"body")
        assert client.getresponse().read() == b"body"


def test_an_answer_streams_through(proxy: FaultProxy, echo: Echo) -> None:
    with connected(proxy) as client:
        client.request("GET", "/key")
        reply = client.getresponse()
        assert reply.read(5) == b"first"
        echo.go.set()
        assert reply.read() == b"second"


def test_errors_come_at_their_rate_and_the_same_with_a_seed(proxy: FaultProxy, echo: Echo) -> None:
    def statuses(running: FaultProxy) -> list[int]:
        running.error_rate = 0.3
        with connected(running) as client:
            return [put(client)[0] for _ in range(200)]

    first = statuses(proxy)
    assert 40 <= first.count(503) <= 80 and first.count(200) == len(echo.seen) == 200 - proxy.counts["error"]
    with FaultProxy("127.0.0.1", echo.server_port) as same:
        assert statuses(same) == first
    with FaultProxy("127.0.0.1", echo.server_port, seed=1) as other:
        assert statuses(other) != first
    proxy.upcoming.append("error")
    proxy.error_rate = 0.0
    with connected(proxy) as client:
        assert b"<Code>SlowDown</Code>" in put(client)[1] and put(client) == (200, b"x")


@pytest.mark.parametrize("body", [b"", b"x" * 100_000])
def test_a_reset_cuts_the_answer_of_a_request_that_was_carried_out(proxy: FaultProxy, echo: Echo, body: bytes) -> None:
    proxy.upcoming.append("reset")
    with connected(proxy) as client, pytest.raises(CUT):
        put(client, body)
    assert len(echo.seen) == 1 and proxy.counts["reset"] == 1
    with connected(proxy) as client:
        assert put(client, body) == (200, body)


def test_delays_and_stalls_take_their_time(proxy: FaultProxy) -> None:
    def seconds(client: http.client.HTTPConnection) -> float:
        began = time.monotonic()
        assert put(client) == (200, b"x")
        return time.monotonic() - began

    with connected(proxy) as client:
        proxy.first_byte_delay = 0.3
        assert seconds(client) >= 0.29
        proxy.first_byte_delay, proxy.stall_seconds = 0.0, 0.5
        proxy.upcoming.append("stall")
        assert seconds(client) >= 0.49
        assert seconds(client) < 0.29


def test_an_outage_cuts_open_connections_and_new_ones_until_it_ends(proxy: FaultProxy, echo: Echo) -> None:
    with connected(proxy) as client:
        assert put(client) == (200, b"x")
        proxy.outage = True
        for _ in range(2):
            with pytest.raises(CUT):
                put(client)
            client.close()
    assert len(echo.seen) == 1 and proxy.counts["refused"] >= 1
    proxy.outage_for(0.3)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with connected(proxy) as client, contextlib.suppress(*CUT):
            assert put(client) == (200, b"x")
            break
    else:
        pytest.fail("the outage did not end")


def test_a_server_that_is_away_is_a_cut_connection(echo: Echo) -> None:
    with FaultProxy("127.0.0.1", 1) as proxy, connected(proxy) as client, pytest.raises(CUT):
        put(client)


def test_the_command_prints_its_address_and_counts(echo: Echo) -> None:
    command = [sys.executable, "-m", "benchmarks.fault_proxy", "--target", f"http://127.0.0.1:{echo.server_port}"]
    with subprocess.Popen([*command, "--error-rate", "1"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline().rsplit(":", 1)[1])
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            assert put(client)[0] == 503
            client.close()
        finally:
            process.send_signal(signal.SIGINT)
        assert "'requests': 1, 'error': 1" in process.stdout.read()
    assert process.returncode == 0
