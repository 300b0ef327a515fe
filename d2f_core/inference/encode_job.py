"""What an encode job will do, checked and decided before it starts."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from d2f_core.data.images import MAX_PIXELS_LIMIT, ImageRules
from d2f_core.data.manifest import Manifest
from d2f_core.data.sources import ImageSource, SourcePlan, plan_images
from d2f_core.inference.encode_records import JOB_NAME, PROGRESS
from d2f_core.model.autoencoder import autoencoder_fingerprint
from d2f_core.model.base import BaseModel, resolve_base
from d2f_core.storage import check_reachable, join, list_names, read_bytes, write_bytes

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
    num_actors: int = 2
    """Processes that hold the autoencoder."""
    cpus_per_actor: int = 1
    """Logical CPUs that Ray reserves per actor, and torch threads of a CPU actor."""
    gpus_per_actor: float = 0

    def __post_init__(self) -> None:
        for name in ("resolution", "rows_per_part", "batch_size", "num_actors", "cpus_per_actor"):
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


def check_encode(config: EncodeConfig) -> tuple[EncodeJob, SourcePlan]:
    """Check everything that can be checked before a cluster is used.

    Raises:
        ValueError: unusable storage, source, base model or resolution; one line each.
    """
    for name, value in (("source.uri", config.source.uri), ("base", config.base), ("output", config.output)):
        if not value:
            raise EncodeError(f"{name} is empty. Give --{name} URI.")
    check_reachable(config.source.uri)
    check_reachable(config.output, write=True)
    base = resolve_base(config.base)
    fingerprint, shape = _fingerprint(config, base), _latent_shape(config, base.path)
    source = plan_images(config.source, rows_per_shard=config.rows_per_part)
    inputs = {
        "source": config.source.uri,
        "source_kind": source.kind,
        "source_digest": source.digest,
        "base": base.uri,
        "base_hash": base.content_hash,
        **asdict(config.rules),
        "rows_per_part": config.rows_per_part,
    }
    return EncodeJob(config=config, fingerprint=fingerprint, inputs=inputs, latent_shape=shape), source


def _fingerprint(config: EncodeConfig, base: BaseModel) -> dict[str, Any]:
    text_encoder = None
    if config.text == "states":
        from d2f_core.model.text_encoder import load_text_encoder

        text_encoder = load_text_encoder(base).fingerprint
    return {
        "autoencoder": autoencoder_fingerprint(base),
        "scaling_factor": float(_vae_config(base.path)["scaling_factor"]),
        "resolution": config.resolution,
        "crop": "center",
        "text": config.text,
        "text_encoder": text_encoder,
    }


def _vae_config(path: Path) -> dict[str, Any]:
    return json.loads((path / "vae/config.json").read_text())


def _latent_shape(config: EncodeConfig, path: Path) -> tuple[int, int, int]:
    vae = _vae_config(path)
    unit = 2 ** (len(vae["block_out_channels"]) - 1)
    if config.resolution % unit:
        nearest = max(unit, config.resolution // unit * unit)
        raise EncodeError(
            f"resolution={config.resolution} is not a multiple of the autoencoder's {unit} pixels per latent. "
            f"Nearest that fits: {nearest}."
        )
    return vae["latent_channels"], config.resolution // unit, config.resolution // unit


def claim_output(job: EncodeJob) -> None:
    """Write what the job is at its output, or check that the job begun there is the same.

    Raises:
        EncodeError: another job began there, naming what differs; or something else lies there.
    """
    place = join(job.config.output, PROGRESS, JOB_NAME)
    if (names := list_names(job.config.output)) and PROGRESS not in names:
        raise EncodeError(
            f"{job.config.output!r} is not empty: it holds {', '.join(names[:5])}. Give another output, or remove them."
        )
    try:
        write_bytes(place, json.dumps(job.identity(), indent=1, sort_keys=True).encode(), exclusive=True)
    except FileExistsError:
        _refuse_other(job, json.loads(read_bytes(place)), "is an unfinished table")


def check_complete_table(job: EncodeJob, manifest: Manifest) -> None:
    """Raises EncodeError when the finished table at the output is not what the job would write."""
    if manifest.kind != "latents":
        raise EncodeError(f"{job.config.output!r} holds a table of {manifest.kind}. Give another output.")
    there = {**manifest.inputs, "fingerprint": manifest.fingerprint}
    _refuse_other(job, there, "is a complete table")


def _refuse_other(job: EncodeJob, there: dict[str, Any], what: str) -> None:
    now = job.identity()
    now, there = ({**values, **values.get("fingerprint", {})} for values in (now, there))
    changed = [
        f"{name} was {there.get(name)}, now {value}"
        for name, value in now.items()
        if name != "fingerprint" and there.get(name) != value
    ]
    if changed:
        raise EncodeError(
            f"{job.config.output!r} {what} of another job: {'; '.join(changed)}. Give another output, or remove it."
        )
