"""A server that was killed comes back at its port, where its users look for it."""

import socket
import threading
import time

import pytest

from infra.local import ports


@pytest.fixture
def listener():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


def test_a_port_that_is_just_being_closed_is_waited_for(listener: socket.socket):
    number = listener.getsockname()[1]
    threading.Timer(0.3, listener.close).start()
    began = time.monotonic()
    ports.wait_until_free([number])
    assert 0.2 < time.monotonic() - began < ports.CLOSING_SECONDS and ports.is_free(number)


def test_a_port_that_another_program_holds_is_not_waited_for_long(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ports, "CLOSING_SECONDS", 0.2)
    ports.wait_until_free([listener.getsockname()[1]])
    assert not ports.is_free(listener.getsockname()[1])
