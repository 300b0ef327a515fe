"""What an encode job is. Light: the tasks that read and write import this, and neither torch nor a model."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from d2f_core.data.images import MAX_PIXELS_LIMIT, ImageRules
from d2f_core.data.sources import ImageSource

MAX_CHUNK_BYTES = 512 * 2**20
"""Pixels of one chunk, which travel between tasks in one piece."""


class EncodeError(ValueError):
    """An encode job that cannot run as asked, with the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    source: ImageSource = field(default_factory=ImageSource)
    """Captioned images."""
    base: str = ""
    """Base model whose autoencoder (and text encoder) is used: a directory, s3:// prefix or hub id."""
    output: str = ""
    """Where the latent table is written; the same command again resumes, and does nothing once it is complete."""
    resolution: int = 64
    """Height and width in pixels that every image is cropped and resized to."""
    min_side: int | None = None
    """Smallest accepted short side in pixels; None: the resolution, so that no image is enlarged."""
    max_pixels: int = 50_000_000
    """Largest accepted width x height of an image file."""
    text: Literal["online", "states"] = "online"
    """`online`: captions are encoded during training. `states`: text states are stored, some 5 times the bytes."""
    rows_per_part: int = 256
    """Samples per output file: what a killed task loses at most."""
    batch_size: int = 16
    """Images per forward pass of the autoencoder."""
    num_readers: int = 2
    """Tasks that read and decode at a time; raise it until the actors never wait."""
    num_actors: int = 2
    """Processes that hold the autoencoder."""
    cpus_per_actor: int = 1
    """Logical CPUs that Ray reserves per actor, and torch threads of a CPU actor."""
    gpus_per_actor: float = 0

    def __post_init__(self) -> None:
        for name in ("resolution", "rows_per_part", "batch_size", "num_readers", "num_actors", "cpus_per_actor"):
            if getattr(self, name) < 1:
                raise EncodeError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.min_side is not None and self.min_side < 1:
            raise EncodeError(f"min_side={self.min_side} must be at least 1 pixel, or None for the resolution.")
        if not 1 <= self.max_pixels <= MAX_PIXELS_LIMIT:
            raise EncodeError(f"max_pixels={self.max_pixels} must be between 1 and {MAX_PIXELS_LIMIT}.")
        rows = MAX_CHUNK_BYTES // (3 * self.resolution**2)
        if self.rows_per_part > rows:
            raise EncodeError(
                f"rows_per_part={self.rows_per_part} images of {self.resolution} pixels are more than "
                f"{MAX_CHUNK_BYTES >> 20} MiB in one piece. Most that fits: {rows}."
            )

    @property
    def rules(self) -> ImageRules:
        min_side = self.resolution if self.min_side is None else self.min_side
        return ImageRules(resolution=self.resolution, min_side=min_side, max_pixels=self.max_pixels)


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """Everything that decides the output's bytes."""

    config: EncodeConfig
    fingerprint: dict[str, Any]
    """What a reader of the latents must match."""
    inputs: dict[str, Any]
    """What the latents are made from."""
    latent_shape: tuple[int, int, int]
    """Channels, height, width."""

    def identity(self) -> dict[str, Any]:
        """What must be equal for two jobs to write the same table; batch size and cluster are free.

        Of the base model only its encoders count, which are in the fingerprint.
        """
        inputs = {name: value for name, value in self.inputs.items() if name not in ("base", "base_hash")}
        return json.loads(json.dumps({**inputs, "fingerprint": self.fingerprint}))
