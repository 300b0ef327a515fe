"""A bad network in front of an S3 or MLflow server: latency, 503 answers, cut connections, stalls and outages.

As a command it prints its address and runs until interrupted; give that address as `AWS_ENDPOINT_URL`:

    python -m benchmarks.fault_proxy --target http://127.0.0.1:9000 --delay 0.02

Only the heads of HTTP/1.1 messages are read. All bytes pass as they came, the `Host` header that AWS signatures cover
among them. Bodies stream. Run it as a process of its own when throughput is measured: a thread shares its interpreter.
"""

import argparse
import asyncio
import concurrent.futures
import dataclasses
import itertools
import random
import re
import signal
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self
from urllib.parse import urlsplit

Fault = Literal["error", "expired", "reset", "stall"]

READ_BYTES = 1 << 20
EARLY_ANSWER_SECONDS = 1.0  # for the rest of a body that the server has answered already
HEADER = re.compile(rb"\r\n(content-length|transfer-encoding|expect)[ \t]*:[ \t]*([^\r\n]*)", re.IGNORECASE)
REFUSALS = {
    "error": (b"503 Slow Down", b"SlowDown", b"Please reduce your request rate."),
    "expired": (b"400 Bad Request", b"ExpiredToken", b"The provided token has expired."),
}
"""Status, code and message of the answers that the proxy gives in place of the server."""
BROKEN = (ConnectionError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)


class End(NamedTuple):
    """Both directions of one connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


@dataclasses.dataclass(frozen=True)
class Message:
    """The head of a request or an answer as it came, and how its body ends."""

    head: bytes
    length: int | None
    """Bytes of the body; None when no header says so."""
    chunked: bool
    expects: bool
    """The sender waits for `100 Continue` before its body."""


class FaultProxy:
    """`with FaultProxy("127.0.0.1", 9000) as proxy:` serves at `proxy.url` from a thread of its own.

    The attributes may be changed while it runs. Each request draws one number from the seeded generator, so that one
    client's sequence of requests meets the same faults every time.
    """

    def __init__(self, target_host: str, target_port: int, *, port: int = 0, seed: int = 0) -> None:
        self.target = (target_host, target_port)
        self.port = port
        """Where it listens, on 127.0.0.1; 0 takes a free one."""
        self.first_byte_delay = 0.0
        """Seconds added before the first byte of each answer: the latency of a far server."""
        self.error_rate = 0.0
        """Share of requests answered by 503 SlowDown; the server does not see them."""
        self.expired = False
        """While true, every request is answered by 400 ExpiredToken, as S3 does when credentials were not renewed."""
        self.reset_rate = 0.0
        """Share of requests that the server carries out, and whose answer is cut in its middle by a TCP reset."""
        self.stall_rate = 0.0
        """Share of requests whose answer waits for `stall_seconds`."""
        self.stall_seconds = 60.0
        self.upcoming: deque[Fault | None] = deque()
        """What happens to the next requests (None: nothing), before the rates apply again."""
        self.short = 0
        """How many of the next objects that are got lose their second half, with a head that says so little is all."""
        self.counts: Counter[str] = Counter()
        """Requests, each kind of fault, and connections `refused` or cut in an outage."""
        self._random = random.Random(seed)
        self._outage = False
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._ready = concurrent.futures.Future[int]()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="fault-proxy", daemon=True)

    @classmethod
    def before(cls, address: str, *, port: int = 0, seed: int = 0) -> Self:
        """A proxy in front of the server at an http:// address."""
        target = urlsplit(address)
        return cls(str(target.hostname), target.port or 80, port=port, seed=seed)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def outage(self) -> bool:
        """While true, every open connection is cut and every new one is reset."""
        return self._outage

    @outage.setter
    def outage(self, value: bool) -> None:
        self._outage = value
        if value:
            self._loop.call_soon_threadsafe(self._cut_all)

    def expired_for(self, seconds: float) -> None:
        """Let all credentials be expired until they are renewed after a while; returns at once."""
        self.expired = True
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, setattr, self, "expired", False)

    def outage_for(self, seconds: float) -> None:
        """Begin an outage that ends by itself; returns at once."""
        self.outage = True
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, setattr, self, "_outage", False)

    def __enter__(self) -> Self:
        self._thread.start()
        self.port = self._ready.result(timeout=10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=10)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=READ_BYTES)
        except OSError as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(server.sockets[0].getsockname()[1])
        await self._stop.wait()
        server.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: the one that asyncio makes of a coroutine complains when the loop ends around it.
        task = asyncio.ensure_future(self._connection(End(reader, writer)))
        self._open[task] = writer
        task.add_done_callback(self._open.pop)

    def _cut_all(self) -> None:
        for writer in list(self._open.values()):
            cut(writer)

    def _fault(self) -> Fault | None:
        draw = self._random.random()
        if self.expired:
            return "expired"
        if self.upcoming:
            return self.upcoming.popleft()
        rates: dict[Fault, float] = {"error": self.error_rate, "reset": self.reset_rate, "stall": self.stall_rate}
        limits = itertools.accumulate(rates.values())
        return next((fault for fault, limit in zip(rates, limits, strict=True) if draw < limit), None)

    async def _connection(self, client: End) -> None:
        """Serve one client; its connection to the server is opened by its first request and kept beside it."""
        server: End | None = None
        try:
            while not self._outage and (request := await read_message(client.reader)):
                fault = self._fault()
                self.counts.update(["requests", fault] if fault else ["requests"])
                if server is not None and server.reader.at_eof():  # it closed an idle connection
                    cut(server.writer)
                    server = None
                if fault in REFUSALS:
                    reusable = await self._refuse(client, request, *REFUSALS[fault])
                else:
                    server = server or End(*await asyncio.open_connection(*self.target, limit=READ_BYTES))
                    reusable = await self._exchange(client, server, request, fault)
                if not reusable:
                    break
        except BROKEN:
            cut(client.writer)
        finally:
            if self._outage:
                self.counts["refused"] += 1
                cut(client.writer)
            client.writer.close()
            if server is not None:
                server.writer.close()

    async def _refuse(self, client: End, request: Message, status: bytes, code: bytes, message: bytes) -> bool:
        """Answer in place of the server; whether the connection can serve another request."""
        body = b"<Error><Code>%s</Code><Message>%s</Message></Error>" % (code, message)
        head = b"HTTP/1.1 %s\r\nContent-Type: text/xml\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
        if not request.expects:
            await copy_body(client.reader, None, request)
        await asyncio.sleep(self.first_byte_delay)
        await send(client.writer, head + (b"" if request.head.startswith(b"HEAD ") else body))
        return not request.expects

    async def _exchange(self, client: End, server: End, request: Message, fault: Fault | None) -> bool:
        """One request and its answer; whether the connection can serve another one."""
        server.writer.write(request.head)
        # Beside the answers: a client that sent `Expect: 100-continue` waits for the first of them with its body.
        body = asyncio.ensure_future(copy_body(client.reader, server.writer, request))
        body.add_done_callback(lambda done: cut(server.writer) if done.cancelled() or done.exception() else None)
        try:
            while True:
                reply = await read_message(server.reader)
                if reply is None:
                    raise ConnectionResetError("the server closed the connection instead of answering")
                await asyncio.sleep(self.first_byte_delay + (self.stall_seconds if fault == "stall" else 0.0))
                if not (status := reply.head.split(b" ", 2)[1]).startswith(b"1"):
                    break
                client.writer.write(reply.head)
            if request.head.startswith(b"HEAD ") or status in (b"204", b"304"):
                reply = dataclasses.replace(reply, length=0, chunked=False)
            if fault == "reset":
                await send_half(server.reader, client.writer, reply)
                raise ConnectionResetError("cut by the proxy")
            if self.short and request.head.startswith(b"GET ") and b"list-type" not in request.head and reply.length:
                self.short -= 1
                self.counts["short"] += 1
                await send_as_whole(server.reader, client.writer, reply)
                return False
            client.writer.write(reply.head)
            framed = reply.chunked or reply.length is not None
            await copy_body(server.reader, client.writer, reply, to_end=not framed)
            await client.writer.drain()
            done, _ = await asyncio.wait({body}, timeout=EARLY_ANSWER_SECONDS)
            return framed and bool(done)
        finally:
            body.cancel()
            await asyncio.wait({body})


def cut(writer: asyncio.StreamWriter) -> None:
    """Close with a TCP reset instead of an orderly end."""
    sock = writer.get_extra_info("socket")
    if not writer.transport.is_closing() and sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def read_message(source: asyncio.StreamReader) -> Message | None:
    """The next head; None when the other side has closed its end."""
    try:
        head = await source.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    headers = {name.lower(): value.strip().lower() for name, value in HEADER.findall(head)}
    length = headers.get(b"content-length")
    chunked = headers.get(b"transfer-encoding", b"").endswith(b"chunked")
    expects = headers.get(b"expect") == b"100-continue"
    return Message(head, None if length is None or chunked else int(length), chunked, expects)


async def copy_body(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter | None, message: Message, *, to_end: bool = False
) -> None:
    """Pass a message's body on as it comes; a `sink` of None drops it. `to_end`: it lasts until the source closes."""
    if message.chunked:
        left = True
        while (line := await source.readuntil(b"\r\n")) != b"\r\n":  # a size; after size 0 trailers, and an empty line
            await send(sink, line)
            left = left and int(line.split(b";")[0], 16)
            await copy_bytes(source, sink, left + 2 if left else 0)
        await send(sink, line)
    elif to_end:
        while data := await source.read(READ_BYTES):
            await send(sink, data)
    else:
        await copy_bytes(source, sink, message.length or 0)


async def copy_bytes(source: asyncio.StreamReader, sink: asyncio.StreamWriter | None, count: int) -> None:
    while count:
        data = await source.read(min(count, READ_BYTES))
        if not data:
            raise asyncio.IncompleteReadError(data, count)
        await send(sink, data)
        count -= len(data)


async def send(sink: asyncio.StreamWriter | None, data: bytes) -> None:
    if sink is not None:
        sink.write(data)
        await sink.drain()


async def send_half(source: asyncio.StreamReader, sink: asyncio.StreamWriter, message: Message) -> None:
    """The first half of an answer's body, or of its head when the body is empty or of unknown length."""
    await send(sink, message.head if message.length else message.head[: len(message.head) // 2])
    await copy_bytes(source, sink, (message.length or 0) // 2)


async def send_as_whole(source: asyncio.StreamReader, sink: asyncio.StreamWriter, message: Message) -> None:
    """The first half of an answer's body, as if that were all: what a proxy does whose cache holds a part.

    Without S3's checksum, as objects have none that were uploaded in parts or to another kind of server.
    """
    half = (message.length or 0) // 2
    head = re.sub(rb"(?i)\r\nx-amz-checksum-[^\r\n]*", b"", message.head)
    await send(sink, re.sub(rb"(?i)(\r\ncontent-length[ \t]*:)[^\r\n]*", rb"\g<1> %d" % half, head))
    await copy_bytes(source, sink, half)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("--target", required=True, help="the server, http://HOST:PORT")
    parser.add_argument("--port", type=int, default=0, help="where to listen on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults")
    parser.add_argument("--delay", dest="first_byte_delay", type=float, help="seconds before each answer")
    parser.add_argument("--error-rate", type=float, help="share of requests answered by 503 SlowDown")
    parser.add_argument("--reset-rate", type=float, help="share of answers cut by a TCP reset")
    parser.add_argument("--stall-rate", type=float, help="share of answers that wait")
    parser.add_argument("--stall-seconds", type=float, help="for how long they wait")
    args = vars(parser.parse_args(argv))
    target = urlsplit(args.pop("target"))
    if target.scheme != "http" or not target.hostname:
        parser.error(f"--target {target.geturl()!r} is not http://HOST:PORT")
    # Before the thread starts, which inherits it: the signals then wait for `sigwait` below.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    with FaultProxy(target.hostname, target.port or 80, port=args.pop("port"), seed=args.pop("seed")) as proxy:
        for name, value in args.items():
            setattr(proxy, name, value)
        print(proxy.url, flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
        print(dict(proxy.counts), flush=True)


if __name__ == "__main__":
    main()
