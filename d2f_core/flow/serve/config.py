"""Config of the online service."""

import ipaddress
from dataclasses import dataclass

from d2f_core.model.config import PredictionName


class ServeError(ValueError):
    """The service cannot run as asked; the message gives the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    model: str = "models:/emoji-flow@champion"
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the directory of a trained or base model (s3:// or local)."""
    base_prediction: PredictionName = ""
    """What the model predicts, if it is an unchanged base whose scheduler config says it wrongly."""
    replicas: int = 1
    """Number of processes that hold the model."""
    cpus_per_replica: float = 1
    """Logical CPUs that Ray reserves per replica, and the replica's torch threads."""
    gpus_per_replica: float = 0
    max_batch_size: int = 8
    """Most images generated in one batch."""
    batch_wait_seconds: float = 0.05
    """Seconds that the first request of a batch waits for others."""
    max_queue: int = 32
    """Most images waiting in addition to those that replicas have accepted; further requests get status 503."""
    host: str = "127.0.0.1"
    """Address to listen on, on the head node; addresses other than 127.0.0.1 require --allow-external and your own
    token."""
    port: int = 8000
    allow_external: bool = False
    """Accept connections from other machines. The service has no TLS: put a proxy with TLS in front."""
    token_file: str = ""
    """File of mode 600 with the token; empty: use D2F_SERVE_TOKEN, or else create a token file."""
    max_prompt_characters: int = 1000
    max_steps: int = 100
    max_pixels: int = 1024 * 1024
    """Largest height x width of an image."""
    max_images: int = 4
    """Most images per request."""
    max_body_bytes: int = 65_536
    request_seconds: float = 120.0
    """Most seconds for one request, including waiting."""
    replace: bool = False
    """First stop what Ray Serve runs on this cluster, such as a service whose command was killed."""

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


def is_loopback(host: str) -> bool:
    """Whether a server at the address can be reached only from this machine; names other than localhost count as
    external.
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
