"""A bucket and an instance's metadata service in this process: for what a real S3 server cannot be told to do.

Signatures are not checked, only that there is one: a request without a signature is refused, as by S3.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LISTING = """<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name><Prefix>{prefix}</Prefix>
<KeyCount>0</KeyCount><MaxKeys>1</MaxKeys><IsTruncated>false</IsTruncated></ListBucketResult>"""
ERROR = "<Error><Code>{code}</Code><Message>{code}</Message></Error>"


class StubS3(ThreadingHTTPServer):
    """One bucket, `there`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _S3Handler)
        self.objects: dict[str, bytes] = {}
        self.allowed = ""
        """Keys and listings outside of this prefix are refused."""
        self.refusals: list[str] = []
        """Codes of S3's errors that the next requests are answered with, by status 400."""
        self.requests: list[str] = []
        """Method, path and query of each request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Mon, 30 Nov 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _S3Handler(_Handler):
    server: StubS3

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, ERROR.format(code=code).encode())

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.requests.append(f"{self.command} {self.path}")
        place = urlsplit(self.path)
        bucket, _, key = unquote(place.path).lstrip("/").partition("/")
        query = parse_qs(place.query)
        prefix = key or query.get("prefix", [""])[0]
        if not self.headers["Authorization"]:
            return self.refuse(403, "AccessDenied")
        if self.server.refusals:
            return self.refuse(400, self.server.refusals.pop(0))
        if bucket != "there":
            return self.refuse(404, "NoSuchBucket")
        if not prefix.startswith(self.server.allowed):
            return self.refuse(403, "AccessDenied")
        if self.command == "GET" and not key:
            return self.answer(200, LISTING.format(bucket=bucket, prefix=prefix).encode())
        self.object(key, body)

    def object(self, key: str, body: bytes) -> None:
        if self.command == "PUT":
            self.server.objects[key] = body
            return self.answer(200)
        if self.command == "DELETE":
            self.server.objects.pop(key, None)
            return self.answer(204)
        if key not in self.server.objects:
            return self.refuse(404, "NoSuchKey")
        self.answer(200, self.server.objects[key])

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = handle_request


class StubMetadata(ThreadingHTTPServer):
    """The credentials of an instance's role, while it is not `away`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _MetadataHandler)
        self.away = 0
        """So many of the next requests are answered by an error."""
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _MetadataHandler(_Handler):
    server: StubMetadata

    def handle_request(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.away > 0:
            self.server.away -= 1
            return self.answer(500, b"busy")
        if self.path.rstrip("/").endswith("/security-credentials"):
            return self.answer(200, b"role")
        if "/security-credentials/" in self.path:
            until = (datetime.now(UTC) + timedelta(hours=6)).strftime("%Y-%m-%dT%H:%M:%SZ")
            keys = {"Code": "Success", "AccessKeyId": "K", "SecretAccessKey": "S", "Token": "T", "Expiration": until}
            return self.answer(200, json.dumps({**keys, "Type": "AWS-HMAC", "LastUpdated": until}).encode())
        self.answer(200, b"token")

    do_GET = do_PUT = handle_request


@contextmanager
def serving(server: StubS3 | StubMetadata) -> Iterator[None]:
    """It answers while the context lasts."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
