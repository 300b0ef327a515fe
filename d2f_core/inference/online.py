"""The online service: images over HTTP from one model, on Ray Serve, behind a token.

    POST /v1/images   {"prompt": ..., "seed": ..., "sample_id": ..., "steps": ...} -> JSON with base64 PNG, or a PNG
    GET  /v1/model    version, hash, defaults, limits, counts
    GET  /healthz     open to all

Only the token's hash leaves the process of the command, so that neither Ray's state nor its logs can hold the token.
"""

import contextlib
import hashlib
import ipaddress
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.exceptions
from ray import serve

from d2f_core.content import cache_root
from d2f_core.inference.image_maker import fill_request
from d2f_core.model.artifact import load_model
from d2f_core.tracking import check_tracking, pin_model, resolve_model

logger = logging.getLogger(__name__)

APPLICATION = "diff2flow"
TOKEN_VARIABLE = "D2F_SERVE_TOKEN"
TOKEN = re.compile(r"[\x21-\x7e]{16,512}")
STOP_SECONDS = 20.0
"""How long requests in work may go on once the service is told to stop."""
DOOR_REQUESTS = 1000
"""Requests that the door holds at a time, most of them waiting for a painter."""


class ServeError(ValueError):
    """A service that cannot run as asked, with the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    model: str = "models:/emoji-flow@champion"
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the directory of a trained or base model (s3:// or local)."""
    replicas: int = 1
    """Processes that hold the model."""
    cpus_per_replica: float = 1
    """Logical CPUs that Ray reserves for each, and its torch threads."""
    gpus_per_replica: float = 0
    max_batch_size: int = 8
    """Most images drawn together."""
    batch_wait_seconds: float = 0.05
    """How long the first request of a batch waits for others."""
    max_queue: int = 32
    """Images that may wait beyond those that the replicas have taken in; more are answered with 503."""
    host: str = "127.0.0.1"
    """Address to listen on, on the head node; another than 127.0.0.1 needs --allow-external and a token of your own."""
    port: int = 8000
    allow_external: bool = False
    """Listen for other machines too. There is no TLS: put a proxy that has it in front."""
    token_file: str = ""
    """File of mode 600 with the token; empty: D2F_SERVE_TOKEN, or else a file that is made."""
    max_prompt_characters: int = 1000
    max_steps: int = 100
    max_pixels: int = 1024 * 1024
    """Largest height x width of an image."""
    max_images: int = 4
    """Of one request."""
    max_body_bytes: int = 65_536
    request_seconds: float = 120.0
    """Most time for one request, waiting included."""
    replace: bool = False
    """End what Ray Serve runs on this cluster first, such as a service whose command was killed."""

    def __post_init__(self) -> None:
        whole = ("replicas", "max_batch_size", "max_queue", "max_prompt_characters", "max_steps", "max_pixels")
        for name in (*whole, "max_images", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ServeError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("cpus_per_replica", "gpus_per_replica", "batch_wait_seconds"):
            if getattr(self, name) < 0:
                raise ServeError(f"{name}={getattr(self, name)} must not be negative.")
        if self.request_seconds <= 0:
            raise ServeError(f"request_seconds={self.request_seconds} must be above 0.")
        if not 1024 <= self.port <= 65_535:
            raise ServeError(f"port={self.port} must be a number from 1024 to 65535.")
        if self.max_queue < self.max_images:
            raise ServeError(
                f"max_queue={self.max_queue} is below max_images={self.max_images}, so that such a request could never "
                f"be taken in. Nearest that fits: {self.max_images}."
            )
        if not is_loopback(self.host) and not self.allow_external:
            raise ServeError(
                f"host={self.host!r} is reached from other machines. Give --host 127.0.0.1, or --allow-external if "
                "that is what you want."
            )


@dataclass(frozen=True, kw_only=True)
class Token:
    """What clients must send; only its hash is kept."""

    digest: bytes
    """sha256."""
    source: str
    """Where it is, for the one who runs the command: a variable or a file."""


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """A service that was checked, and is ready to start."""

    config: ServeConfig
    model_uri: str
    """Pinned: never an alias."""
    model_hash: str


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at that address; a name other than localhost counts as outer."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def obtain_token(config: ServeConfig) -> Token:
    """The token by the config's file, by D2F_SERVE_TOKEN (which is then taken out of the environment), or a new one.

    Out of the environment, because a Ray that is started here would hand it to all its processes.

    Raises:
        ServeError: no usable token; never shows it.
    """
    given = os.environ.pop(TOKEN_VARIABLE, "")
    if config.token_file:
        path = Path(config.token_file).expanduser()
    elif given:
        return _token(given, TOKEN_VARIABLE)
    else:
        path = cache_root() / "serve_token"
        if not is_loopback(config.host):
            raise ServeError(
                f"host={config.host!r} is reached from other machines, which needs a token that you chose. Set "
                f"{TOKEN_VARIABLE}, or give --token-file FILE."
            )
        _make_token(path)
    try:
        file = path.stat()
        if file.st_uid != os.getuid() or file.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ServeError(f"{path} must be your own file that nobody else can read. chmod 600 {path}.")
        return _token(path.read_text().strip(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"{path} cannot be read ({type(error).__name__}). Give --token-file another file.") from None


def _token(text: str, source: str) -> Token:
    if not TOKEN.fullmatch(text):
        raise ServeError(
            f"the token in {source} has {len(text)} characters. It must have 16 to 512, all of them visible ASCII. "
            "Make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return Token(digest=hashlib.sha256(text.encode()).digest(), source=source)


def _make_token(path: Path) -> None:
    """A new token in a file for this user alone; one that is there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")


def check_serve(config: ServeConfig) -> ServeJob:
    """Check everything that can be checked before a cluster is used.

    Raises:
        ValueError: no such model, or its defaults are beyond the service's limits.
    """
    if config.model.startswith("models:/"):
        check_tracking()
    pinned = pin_model(config.model)
    model = load_model(resolve_model(pinned))
    usual = fill_request(model, prompt="")
    for name, value, most in (
        ("steps", usual.steps, config.max_steps),
        ("height x width", usual.height * usual.width, config.max_pixels),
    ):
        if value > most:
            limit = "max_steps" if name == "steps" else "max_pixels"
            raise ServeError(f"{limit}={most} is below the model's own {name} of {value}. Raise it.")
    return ServeJob(config=config, model_uri=pinned, model_hash=model.content_hash)


@contextlib.contextmanager
def service(job: ServeJob, token: Token) -> Iterator[str]:
    """Run the service while the context lasts; yields its URL. Needs a running Ray.

    Raises:
        ServeError: Ray Serve runs there already, the cluster is too small, or it did not start.
    """
    config = job.config
    _clear(config)
    _check_room(config)
    try:
        # One proxy, on the head node: the address that is printed is the only one.
        serve.start(proxy_location="HeadOnly", http_options={"host": config.host, "port": config.port})
        serve.run(_application(job, token), name=APPLICATION, route_prefix="/")
        yield f"http://{config.host}:{config.port}"
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())[-600:]
        raise ServeError(f"the service did not start or broke off at port {config.port}: {reason}") from error
    finally:
        serve.shutdown()


def is_running() -> bool:
    """Whether the service is still there, or was ended from elsewhere."""
    try:
        return APPLICATION in serve.status().applications
    except ray.exceptions.ActorDiedError:  # of Ray Serve's controller, known here from an earlier call
        return False


def _clear(config: ServeConfig) -> None:
    status = serve.status()
    if not status.proxies and not status.applications:
        return
    if not config.replace:
        raise ServeError(
            f"Ray Serve runs on this cluster already (applications: {', '.join(status.applications) or 'none'}), and "
            "its address cannot be changed. End that service, or give --replace to end it now."
        )
    serve.shutdown()


def _check_room(config: ServeConfig) -> None:
    there = ray.cluster_resources()
    for name, each in (("CPU", config.cpus_per_replica), ("GPU", config.gpus_per_replica)):
        if each * config.replicas > there.get(name, 0):
            raise ServeError(
                f"replicas={config.replicas} need {each * config.replicas:g} {name}, and the cluster has "
                f"{there.get(name, 0):g}. Ask for fewer, or add nodes."
            )


def _application(job: ServeJob, token: Token) -> serve.Application:
    from d2f_core.inference.online_app import Door, Painter

    config = job.config
    painters = serve.deployment(
        Painter,
        num_replicas=config.replicas,
        # One batch is drawn while the next one gathers; all others wait where `max_queue` counts them.
        max_ongoing_requests=2 * config.max_batch_size,
        max_queued_requests=config.max_queue,
        graceful_shutdown_timeout_s=STOP_SECONDS,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
    )
    door = serve.deployment(
        Door,
        max_ongoing_requests=DOOR_REQUESTS,
        max_queued_requests=DOOR_REQUESTS,
        graceful_shutdown_timeout_s=STOP_SECONDS,
        ray_actor_options={"num_cpus": 0},
    )
    return door.bind(painters.bind(job.model_uri, job.model_hash, config), token.digest, config)
