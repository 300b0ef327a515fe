"""State that the stack stores in its directory: ports and generated credentials, readable only by its user."""

import json
import os
import re
import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BUCKET = "d2f"
REGION = "us-east-1"
JOB_LOG = "logs/job.log"
"""File in a stack's directory with the output of the last job that was submitted with --quiet."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Ports and credentials of one stack."""

    directory: Path
    ports: Mapping[str, int]
    access_key: str
    secret_key: str
    ray_token: str

    @property
    def token_path(self) -> Path:
        return self.directory / "ray_token"

    def url(self, port: str) -> str:
        """`http://127.0.0.1:PORT` for the port with this name."""
        return f"http://127.0.0.1:{self.ports[port]}"


def stack_directory() -> Path:
    """`.local` beside the code, or the directory that D2F_LOCAL_DIR names."""
    return Path(os.environ.get("D2F_LOCAL_DIR") or Path(__file__).parents[2] / ".local").expanduser().resolve()


def load_state(directory: Path) -> State:
    """The stored state, or new credentials and no ports if there is no readable state."""
    try:
        known = json.loads((directory / "state.json").read_text())
        ports = {str(k): int(v) for k, v in known["ports"].items()}
        keys = (str(known["access_key"]), str(known["secret_key"]), str(known["ray_token"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        ports, keys = {}, (secrets.token_hex(10).upper(), secrets.token_hex(20), secrets.token_hex(32))
    return State(directory=directory, ports=ports, access_key=keys[0], secret_key=keys[1], ray_token=keys[2])


def save_state(state: State, variables: Mapping[str, str]) -> None:
    """Write `state.json`, `ray_token` and `env` (shell lines), each atomically and readable only by its owner."""
    known = {
        "ports": dict(state.ports),
        "access_key": state.access_key,
        "secret_key": state.secret_key,
        "ray_token": state.ray_token,
    }
    write_private(state.directory / "state.json", json.dumps(known, indent=2) + "\n")
    write_private(state.token_path, state.ray_token)
    write_private(state.directory / "env", shell_lines(variables))


def shell_lines(variables: Mapping[str, str]) -> str:
    """Lines for a shell to source; they also unset variables that would override the credentials."""
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in variables.items())
    return f"unset AWS_SESSION_TOKEN AWS_PROFILE\n{exports}"


def read_variables(env_file: Path) -> dict[str, str]:
    """The `export` lines of an env file, as a dictionary."""
    lines = re.findall(r"^export (\w+)=(.*)$", env_file.read_text(), flags=re.MULTILINE)
    return {key: shlex.split(value)[0] if value else "" for key, value in lines}


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically; it never exists with permissions wider than 600."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
