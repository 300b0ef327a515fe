"""Questions that the stack's tests ask a server or the system."""

import urllib.error
import urllib.request
from pathlib import Path

import psutil

from infra.local.processes import owned
from infra.local.seaweed import make_client
from infra.local.state import load_state


def s3_client(directory: Path):
    state = load_state(directory)
    return make_client(state.url("s3"), state.access_key, state.secret_key, seconds=60)


def pids(directory: Path, part: str | None = None) -> set[int]:
    return {o.process.pid for o in owned(directory, part)}


def status_of(url: str, *, token: str | None = None, body: bytes | None = None) -> int:
    """HTTP status of a GET, or of a POST of JSON."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """Addresses at which these processes accept connections."""
    found = set()
    for connection in psutil.net_connections("tcp"):
        if connection.pid in pids and connection.status == psutil.CONN_LISTEN:
            found.add((connection.laddr.ip, connection.laddr.port))
    return found
