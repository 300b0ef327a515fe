"""One server of the stack: how it is started, when it is ready, how long it may take."""

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

# A user's own settings that would lead a server or a job away from this stack.
FOREIGN = ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "HF_HUB_OFFLINE", "RAY_ADDRESS")
REQUEST_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """A server. `problem` returns None when it answers rightly, and otherwise what is wrong."""

    name: str
    argv: tuple[str, ...]
    variables: Mapping[str, str]
    """Environment of the server beside the user's own."""
    problem: Callable[[], str | None]
    address: str
    start_seconds: float
    stop_seconds: float
    before_start: Callable[[], None] = lambda: None
    before_stop: Callable[[], None] = lambda: None
    after_stop: Callable[[], None] = lambda: None

    @property
    def digest(self) -> str:
        """Changes with every setting, so that a server with outdated settings is recognised and replaced."""
        settings = json.dumps([self.argv, sorted(self.variables.items())])
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    def environment(self) -> dict[str, str]:
        """The user's environment without what leads astray, this Python's commands first on the path."""
        kept = {key: value for key, value in os.environ.items() if key not in FOREIGN}
        path = f"{scripts()}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        return {**kept, **past_proxies(), "PATH": path, **self.variables}


def past_proxies() -> dict[str, str]:
    """Local addresses ahead of the user's own list of hosts that need no proxy."""
    others = [host for host in os.environ.get("NO_PROXY", "").split(",") if host not in ("", "127.0.0.1", "localhost")]
    value = ",".join(["127.0.0.1", "localhost", *others])
    return {"NO_PROXY": value, "no_proxy": value}


def scripts() -> Path:
    """The directory of this Python's installed commands."""
    return Path(sysconfig.get_path("scripts"))


def command(name: str) -> str:
    """Path of an installed command. Raises StackError when its package is missing."""
    path = scripts() / name
    if not path.is_file():
        raise StackError(f"{path} does not exist. The local stack needs the demo packages: pip install -e '.[demo]'.")
    return str(path)


def get(url: str, *, token: str | None = None) -> str | None:
    """None when a GET answers 200, otherwise what went wrong."""
    try:
        with _open(url, token) as answer:
            return None if answer.status == 200 else f"{url} answers {answer.status}"
    except (urllib.error.URLError, OSError) as error:
        return f"{url}: {error}"


def ask(url: str, *, token: str | None = None, method: str = "GET") -> Any:
    """The JSON that is answered. Raises StackError when none is."""
    try:
        with _open(url, token, method) as answer:
            return json.load(answer)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise StackError(f"{url}: {error}. The local stack must run: python -m infra.local up") from None


def _open(url: str, token: str | None, method: str = "GET") -> Any:
    """No proxy is asked for a local address."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(request, timeout=REQUEST_SECONDS)
