"""Ports of the stack: kept from one start to the next, chosen free the first time, or fixed by the user."""

import os
import random
import socket
import time
from collections.abc import Iterable, Mapping

from infra.local.processes import StackError

CLOSING_SECONDS = 3.0
GRPC_OFFSET = 10_000
"""SeaweedFS serves gRPC at its HTTP port plus this."""
# Below the range that Linux uses for outgoing connections (32768 and up), including the gRPC ports.
LOWEST, HIGHEST = 12_000, 22_000

FIXED_BY = {
    "s3": "D2F_S3_PORT",
    "mlflow": "D2F_MLFLOW_PORT",
    "ray": "D2F_RAY_PORT",
    "ray_dashboard": "D2F_DASHBOARD_PORT",
}
NAMES = (
    "s3", "s3_master", "s3_filer", "s3_volume", "s3_admin",
    "mlflow", "ray", "ray_dashboard", "ray_agent", "ray_client",
)  # fmt: skip


def is_free(port: int) -> bool:
    """Whether nothing listens on 127.0.0.1:`port` (connections that are still closing do not count)."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def wait_until_free(ports: Iterable[int]) -> None:
    """Wait briefly for the kernel to close the sockets of servers that were just killed.

    Otherwise a server would restart at another port, where its clients do not look for it.
    """
    wanted, deadline = list(ports), time.monotonic() + CLOSING_SECONDS
    while not all(is_free(port) for port in wanted) and time.monotonic() < deadline:
        time.sleep(0.05)


def fixed(name: str) -> int | None:
    """The port that the user's environment asks for. Raises StackError when it is not a port number."""
    variable = FIXED_BY.get(name)
    text = os.environ.get(variable, "") if variable else ""
    if not text:
        return None
    highest = 65_535 - GRPC_OFFSET if name == "s3" else 65_535
    if not text.isdecimal() or not 1024 <= int(text) <= highest:
        raise StackError(f"{variable}={text!r} is not a port. Give a number from 1024 to {highest}, or unset it.")
    return int(text)


def choose(kept: Mapping[str, int], busy_is_ours: Iterable[str] = ()) -> dict[str, int]:
    """A port for every name: the user's, else the previous one if it is free, else any free one.

    Args:
        kept: ports of the previous start.
        busy_is_ours: names whose previous port is used by this stack itself, and is kept.

    Raises:
        StackError: a port fixed by the user is taken by another program, or fixed twice.
    """
    ours = set(busy_is_ours)
    chosen: dict[str, int] = {}
    for name in sorted(NAMES, key=lambda n: fixed(n) is None):  # the user's ports first, so that others avoid them
        wanted = fixed(name)
        if wanted is not None and wanted in chosen.values():
            raise StackError(f"{FIXED_BY[name]}={wanted} is given to two servers. Each needs a port of its own.")
        if name in ours and kept.get(name) is not None and wanted in (None, kept[name]):
            chosen[name] = kept[name]
        elif wanted is not None:
            _require_free(name, wanted)
            chosen[name] = wanted
        elif (old := kept.get(name)) is not None and _fits(name, old, chosen.values()):
            chosen[name] = old
        else:
            chosen[name] = _pick(name, {*chosen.values(), *kept.values()})
    return chosen


def _fits(name: str, port: int, used: Iterable[int]) -> bool:
    both = {port, port + GRPC_OFFSET} if name.startswith("s3") else {port}
    return not both & set(used) and all(is_free(p) for p in both)


def _pick(name: str, used: Iterable[int]) -> int:
    for port in random.sample(range(LOWEST, HIGHEST), k=500):
        if _fits(name, port, used):
            return port
    raise StackError(f"no free port between {LOWEST} and {HIGHEST} on 127.0.0.1 in 500 tries. Stop some servers.")


def _require_free(name: str, port: int) -> None:
    for number in (port, port + GRPC_OFFSET) if name == "s3" else (port,):
        if not is_free(number):
            raise StackError(
                f"port {number} ({FIXED_BY[name]}={port}) on 127.0.0.1 is taken by another program. Ports of the "
                f"stack must be free: stop that program, give another number, or unset {FIXED_BY[name]}."
            )
