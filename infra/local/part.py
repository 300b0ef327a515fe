"""One server of the stack: how it is started, when it is ready, and its time limits."""

import hashlib
import json
import os
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.local.processes import StackError

# Variables of the user's environment that would direct a server or a job away from this stack.
FOREIGN = ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "HF_HUB_OFFLINE", "RAY_ADDRESS")
REQUEST_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """A server of the stack. `problem` returns None when the server answers correctly, otherwise what is wrong."""

    name: str
    argv: tuple[str, ...]
    variables: Mapping[str, str]
    """Environment variables of the server in addition to the user's own."""
    problem: Callable[[], str | None]
    address: str
    start_seconds: float
    stop_seconds: float
    before_start: Callable[[], None] = lambda: None
    before_stop: Callable[[], None] = lambda: None
    after_stop: Callable[[], None] = lambda: None

    @property
    def digest(self) -> str:
        """Digest of the server's settings, by which a server with outdated settings is detected and replaced."""
        settings = json.dumps([self.argv, sorted(self.variables.items())])
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    def environment(self) -> dict[str, str]:
        """The user's environment without `FOREIGN` variables, with this Python's commands first on PATH."""
        kept = {key: value for key, value in os.environ.items() if key not in FOREIGN}
        path = f"{scripts()}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        return {**kept, **past_proxies(), "PATH": path, **self.variables}


def past_proxies() -> dict[str, str]:
    """no_proxy variables with local addresses added before the user's own hosts."""
    others = [host for host in os.environ.get("NO_PROXY", "").split(",") if host not in ("", "127.0.0.1", "localhost")]
    value = ",".join(["127.0.0.1", "localhost", *others])
    return {"NO_PROXY": value, "no_proxy": value}


def scripts() -> Path:
    """Directory of this Python's installed commands."""
    return Path(sysconfig.get_path("scripts"))


def command(name: str) -> str:
    """Path of an installed command. Raises StackError when its package is missing."""
    path = scripts() / name
    if not path.is_file():
        raise StackError(f"{path} does not exist. The local stack needs the demo packages: pip install -e '.[demo]'.")
    return str(path)


def get(url: str, *, token: str | None = None) -> str | None:
    """Send a GET; returns None when the answer is 200, otherwise what went wrong."""
    try:
        with _open(url, token) as answer:
            return None if answer.status == 200 else f"{url} answers {answer.status}"
    except (urllib.error.URLError, OSError) as error:
        return f"{url}: {error}"


def ask(url: str, *, token: str | None = None, method: str = "GET") -> Any:
    """Send a request; returns the JSON of the answer. Raises StackError without a JSON answer."""
    try:
        with _open(url, token, method) as answer:
            return json.load(answer)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise StackError(f"{url}: {error}. The local stack must run: python -m infra.local up") from None


def _open(url: str, token: str | None, method: str = "GET") -> Any:
    """Send a request without a proxy, because the address is local."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(request, timeout=REQUEST_SECONDS)
