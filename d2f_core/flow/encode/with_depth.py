"""Images with depth as samples of an encode job, for training depth latents conditioned on image latents."""

import dataclasses
from typing import Any, cast

import numpy as np

from d2f_core.data.depth import BadDepthError, crop_and_resize, latent_mask, normalise_depth, size_text
from d2f_core.data.depth_files import decode_npy
from d2f_core.data.images import BadImageError, prepare_image
from d2f_core.data.schema import sample_id
from d2f_core.data.sources.config import DepthSource
from d2f_core.data.sources.depth import DepthSample, read_depth, read_valid
from d2f_core.flow.encode.config import EncodeDepthConfig
from d2f_core.flow.encode.spec import EncodeKind, EncodeSpec, Picture
from d2f_core.flow.latents import DEPTH_TASK, depth_latent_schema


def identify(sample: DepthSample) -> str:
    """Sample id: hash of the image only, as one image has one depth."""
    if sample.image is None:
        raise BadImageError("no_image: none found")
    return sample_id(sample.image, "")


def prepare(sample: DepthSample, spec: EncodeSpec) -> dict[str, Any]:
    """Image and depth with the same crop and size, depth in its affine-invariant form, and the mask of valid
    latents.
    """
    assert sample.image is not None  # checked by `identify`
    size, rules = spec.config.resolution, spec.config.rules
    image = prepare_image(sample.image, rules, key=identify(sample) if rules.crop == "random" else "")
    if image.turned:
        raise BadImageError("orientation: the image is turned by its metadata, its depth is not")
    depth = read_depth(sample, _source(spec), spec.config.max_pixels)
    if depth is None:
        raise BadDepthError("no_depth: none found")
    if depth.shape != (image.height, image.width):
        raise BadDepthError(f"depth_size: the depth is {size_text(depth)} px, its image {image.width}x{image.height}")
    depth = crop_and_resize(depth, image.crop, size)
    valid = np.isfinite(depth)
    picture, _, _ = normalise_depth(depth, valid)
    return {
        "caption": "",
        "width": image.width,
        "height": image.height,
        "crop": image.crop,
        "pixels": image.pixels,
        "depth_picture": picture,
        "mask": latent_mask(valid, spec.latent_shape[1:]),
    }


def identify_latents(sample: DepthSample) -> str:
    if sample.latent is None or sample.depth_latent is None:
        raise BadDepthError("no_latent: none found")
    return sample_id(sample.latent + sample.depth_latent, "")


def prepare_latents(sample: DepthSample, spec: EncodeSpec) -> dict[str, Any]:
    """Stored latents unchanged, with the mask from the sample's depth or mask file, if there is one."""
    assert sample.latent is not None and sample.depth_latent is not None  # checked by `identify`
    size = spec.config.resolution
    joined, latent = (_read_latent(data, spec.latent_shape) for data in (sample.latent, sample.depth_latent))
    counts = read_valid(sample, _source(spec), spec.config.max_pixels)
    valid = np.ones((size, size), bool)
    if counts is not None:
        height, width = counts.shape
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        holes = np.where(counts, np.float32(1), np.float32(np.nan))
        valid = np.isfinite(crop_and_resize(holes, (left, top, left + side, top + side), size))
        if not valid.any():
            raise BadDepthError("no_valid_pixels: the mask leaves none")
    return {
        "caption": "",
        "width": size,
        "height": size,
        "crop": (0, 0, size, size),
        "latent_mean": latent,
        "latent_std": np.zeros_like(latent),
        "joined_mean": joined,
        "mask": latent_mask(valid, spec.latent_shape[1:]),
    }


def _source(spec: EncodeSpec) -> DepthSource:
    return cast(EncodeDepthConfig, spec.config).source


def _read_latent(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    latent = decode_npy(data, int(np.prod(shape)))
    if latent.shape != shape:
        raise BadDepthError(f"latent_size: a latent of shape {latent.shape}, the base model's are {shape}")
    with np.errstate(over="ignore"):
        half = latent.astype(np.float16)
    if not np.isfinite(half).all():
        raise BadDepthError("not_finite: a latent in half precision")
    return half


DEPTH = EncodeKind(
    schema=depth_latent_schema,
    pictures=(
        Picture(name="depth_picture", dtype="float32", mean="latent_mean", std="latent_std"),
        Picture(name="pixels", dtype="uint8", mean="joined_mean", std=None),
    ),
    identify=identify,
    prepare=prepare,
    fingerprint={"task": DEPTH_TASK},
)

DEPTH_LATENTS = dataclasses.replace(DEPTH, pictures=(), identify=identify_latents, prepare=prepare_latents)
"""Depth samples whose latents were encoded elsewhere."""
