"""Checks an encode job and makes its specification before it starts."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from d2f_core.batch.table_claim import begun_identity
from d2f_core.batch.table_job import TableJob, check_output
from d2f_core.data.aspect_buckets import size_name
from d2f_core.data.image_rules import CROPS, Decoding
from d2f_core.data.sources.config import lies_in
from d2f_core.data.sources.depth import plan_depth
from d2f_core.data.sources.images import plan_images
from d2f_core.data.sources.listing import SourcePlan
from d2f_core.flow.encode.actor import LatentEncoder
from d2f_core.flow.encode.captioned import captioned
from d2f_core.flow.encode.config import EncodeConfig, EncodeDepthConfig, EncodeError, EncodeSettings
from d2f_core.flow.encode.spec import EncodeKind, EncodeSpec
from d2f_core.flow.encode.with_depth import DEPTH, DEPTH_LATENTS
from d2f_core.flow.latents import PADDED
from d2f_core.identity import identity_values
from d2f_core.model.autoencoder import autoencoder_fingerprint, check_autoencoder, latent_scale
from d2f_core.model.base import BaseModel, describe_base
from d2f_core.model.caption_rules import DEFAULT, CaptionRules, written_rules
from d2f_core.storage import check_reachable


def check_encode(config: EncodeConfig) -> TableJob:
    """Check everything that can be checked before a cluster is used.

    Raises:
        ValueError: unusable storage, source, base model or resolution; one line each.
    """
    plan = partial(plan_images, config.source, rows_per_shard=config.rows_per_part)
    kind = captioned(flipped=config.flip, masked=config.crop == PADDED)
    return _check(config, kind, config.source.uri, plan, text=config.text, captions=config.captions)


def check_encode_depth(config: EncodeDepthConfig) -> TableJob:
    """Like `check_encode`, for images with depth."""
    plan = partial(plan_depth, config.source, rows_per_shard=config.rows_per_part)
    if config.crop == PADDED:
        raise EncodeError(
            f"crop={config.crop!r} is for captioned images; depth beside an image would be learned as depth. Use "
            f"{', '.join(CROPS)}."
        )
    if config.source.latents and config.crop != "center":
        raise EncodeError(
            f"crop={config.crop!r} says nothing about latents that were encoded elsewhere; masks beside them are "
            "cut at their centre. Leave it out."
        )
    kind = DEPTH_LATENTS if config.source.latents else DEPTH
    how = {name: value for name, value in identity_values(config.source).items() if name not in ("uri", "kind")}
    return _check(config, kind, config.source.uri, plan, inputs={"depth": how})


def _check(
    config: EncodeSettings,
    kind: EncodeKind,
    source: str,
    plan: Callable[[], SourcePlan],
    *,
    text: str = "online",
    captions: CaptionRules = DEFAULT,
    inputs: Mapping[str, Any] | None = None,
) -> TableJob:
    for name, value in (("source.uri", source), ("base", config.base), ("output", config.output)):
        if not value:
            raise EncodeError(f"{name} is empty. Give --{name} URI.")
    if lies_in(config.output, source):
        raise EncodeError(f"output={config.output!r} lies inside the source {source!r}. Put it beside it.")
    check_reachable(source)
    check_reachable(config.base)
    check_reachable(config.output, write=True)
    config = dataclasses.replace(config, decoding=chosen_decoding(config))
    base = describe_base(config.base).read_captions(captions)
    check_autoencoder(base)
    fingerprint = {**_fingerprint(base, config, text), **kind.fingerprint}
    shape = latent_shape(config, base.path)
    planned = plan()
    made_from = {
        "source": source,
        "source_kind": planned.kind,
        "source_digest": planned.digest,
        "base": base.uri,
        "base_hash": base.content_hash,
        **identity_values(config.rules),
        "rows_per_part": config.rows_per_part,
        **(inputs or {}),
    }
    spec = EncodeSpec(config=config, kind=kind, fingerprint=fingerprint, inputs=made_from, latent_shape=shape)
    job = TableJob(spec=spec, source=planned, actor=LatentEncoder)
    check_output(job)
    return job


def chosen_decoding(config: EncodeSettings) -> Decoding:
    """As the config says; otherwise as the table at the output was begun, where those that do not say are of releases
    that ignored profiles; otherwise sRGB.
    """
    if config.decoding is not None:
        return config.decoding
    begun = begun_identity(config.output)
    return "srgb" if begun is None else begun.get("decoding", "stored")


def _fingerprint(base: BaseModel, config: EncodeSettings, text: str) -> dict[str, Any]:
    text_encoder = None
    if text == "states" or base.captions != DEFAULT:
        from d2f_core.model.text_encoder import describe_text_encoder

        described = describe_text_encoder(base)  # which refuses rules that it cannot follow
        text_encoder = described.fingerprint if text == "states" else None
    return {
        "autoencoder": autoencoder_fingerprint(base),
        "scaling_factor": latent_scale(base).factor,
        "resolution": config.resolution,
        "crop": config.crop,
        "text": text,
        "text_encoder": text_encoder,
        **written_rules(base.captions),
    }


def _vae_config(path: Path) -> dict[str, Any]:
    return json.loads((path / "vae/config.json").read_text())


def latent_shape(config: EncodeSettings, path: Path) -> tuple[int, int, int]:
    """Channels, height and width of the latents of a base at a path, of squares of the resolution; EncodeError if the
    resolution or a bucket does not fit.
    """
    vae = _vae_config(path)
    unit = 2 ** (len(vae["block_out_channels"]) - 1)
    if config.resolution % unit:
        nearest = max(unit, config.resolution // unit * unit)
        raise EncodeError(
            f"resolution={config.resolution} is not a multiple of the autoencoder's {unit} pixels per latent. "
            f"Nearest that fits: {nearest}."
        )
    if wrong := [size_name(size) for size in config.sizes if size[0] % unit or size[1] % unit]:
        raise EncodeError(
            f"buckets {', '.join(wrong[:5])}: sides are not multiples of the autoencoder's {unit} pixels per latent. "
            "Give sizes or a bucket_step that are."
        )
    return vae["latent_channels"], config.resolution // unit, config.resolution // unit
