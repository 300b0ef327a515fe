"""The online service: images over HTTP from one model, on Ray Serve, behind a token.

    POST /v1/images   {"prompt": ..., "seed": ..., "sample_id": ..., "steps": ...} -> JSON with base64 PNG, or a PNG
    GET  /v1/model    version, hash, defaults, limits, counts
    GET  /healthz     open to all

Only the token's hash leaves the command's process, so that neither Ray's state nor its logs can contain the token.
"""

import contextlib
import hashlib
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path

import ray
import ray.exceptions
from ray import serve

from d2f_core.flow.generate.sampler import fill_request
from d2f_core.flow.serve.config import ServeConfig, ServeError, is_loopback
from d2f_core.hashing import cache_root
from d2f_core.model.artifact import describe_model
from d2f_core.nodes import Part
from d2f_core.resources import Demand, InsufficientResourcesError, reserve
from d2f_core.storage import check_reachable
from d2f_core.tracking import check_tracking, pin_model, resolve_model

logger = logging.getLogger(__name__)

APPLICATION = "diff2flow"
TOKEN_VARIABLE = "D2F_SERVE_TOKEN"
TOKEN = re.compile(r"[\x21-\x7e]{16,512}")
STOP_SECONDS = 20.0
"""Seconds that requests in progress may continue after the service is told to stop."""
DOOR_REQUESTS = 1000
"""Most concurrent requests in the ingress, most of them waiting for a replica."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """The token that clients must send; only its hash is stored."""

    digest: bytes
    """sha256 of the token."""
    source: str
    """Where the token is found, for the operator: a variable or a file."""


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """A checked service that is ready to start."""

    config: ServeConfig
    model_uri: str
    """URI of the model, with aliases resolved to a version."""
    model_hash: str


def obtain_token(config: ServeConfig) -> Token:
    """The token from the config's file, from D2F_SERVE_TOKEN (which is then removed from the environment), or a new
    one.

    Removed, because a Ray that is started here would pass it on to all its processes.

    Raises:
        ServeError: there is no usable token; the message never contains it.
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
    """Write a new token to a file that only this user can read; an existing file is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")


def check_serve(config: ServeConfig) -> ServeJob:
    """Check everything that can be checked before a cluster is used.

    Raises:
        ValueError: the model does not exist, or its defaults exceed the service's limits.
    """
    check_reachable(config.model)
    if config.model.startswith("models:/"):
        check_tracking()
    pinned = pin_model(config.model)
    model = describe_model(resolve_model(pinned), base_prediction=config.base_prediction)
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
    """Context in which the service runs; yields its URL. Needs a running Ray.

    Raises:
        ServeError: Ray Serve is already running, the cluster is too small, or the service did not start.
    """
    config = job.config
    _clear(config)
    check_room(config)
    try:
        # One proxy, on the head node, so that the printed address is the only one.
        serve.start(proxy_location="HeadOnly", http_options={"host": config.host, "port": config.port})
        serve.run(_application(job, token), name=APPLICATION, route_prefix="/")
        yield f"http://{config.host}:{config.port}"
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())[-600:]
        raise ServeError(f"the service did not start or broke off at port {config.port}: {reason}") from error
    finally:
        serve.shutdown()


def is_running() -> bool:
    """Whether the service is still running; it may have been stopped from elsewhere."""
    try:
        return APPLICATION in serve.status().applications
    except ray.exceptions.ActorDiedError:  # Ray Serve's controller, cached by an earlier call
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


def check_room(config: ServeConfig) -> None:
    """Raises ServeError when the replicas find no room on the nodes beside what other jobs hold there."""
    each = {"CPU": config.cpus_per_replica, "GPU": config.gpus_per_replica}
    if not any(each.values()):
        return
    demand = Demand(
        counts=[config.replicas],
        parts=lambda count: [Part("replica", count, each)],
        subject="replicas={count} need",
        advice="Ask for fewer, lower cpus_per_replica or gpus_per_replica, or add nodes.",
    )
    try:
        reserve(demand, seconds=STOP_SECONDS if config.replace else 0, fewer_after=inf).release()
    except InsufficientResourcesError as error:
        raise ServeError(str(error)) from None


def _application(job: ServeJob, token: Token) -> serve.Application:
    from d2f_core.flow.serve.deployments import ImageReplica, Ingress

    config = job.config
    painters = serve.deployment(
        ImageReplica,
        num_replicas=config.replicas,
        # One batch is generated while the next one collects; all others wait in the queue, which `max_queue` limits.
        max_ongoing_requests=2 * config.max_batch_size,
        max_queued_requests=config.max_queue,
        graceful_shutdown_timeout_s=STOP_SECONDS,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
    )
    door = serve.deployment(
        Ingress,
        max_ongoing_requests=DOOR_REQUESTS,
        max_queued_requests=DOOR_REQUESTS,
        graceful_shutdown_timeout_s=STOP_SECONDS,
        ray_actor_options={"num_cpus": 0},
    )
    return door.bind(painters.bind(job.model_uri, job.model_hash, config), token.digest, config)
