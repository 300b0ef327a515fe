"""Captioned images as samples of an encode job."""

from functools import partial
from typing import Any

import numpy as np

from d2f_core.data.captions import check_caption
from d2f_core.data.images import BadImageError, PreparedImage, prepare_image
from d2f_core.data.schema import sample_id
from d2f_core.data.sources.sample import Sample
from d2f_core.flow.encode.spec import EncodeKind, EncodeSpec, Picture
from d2f_core.flow.latents import FLIPPED, latent_schema


def identify(sample: Sample) -> str:
    """Sample id: hash of image and caption."""
    if sample.image is None:
        raise BadImageError("no_image: none found")
    return sample_id(sample.image, check_caption(sample.caption))


def prepare(sample: Sample, spec: EncodeSpec) -> dict[str, Any]:
    assert sample.image is not None  # checked by `identify`
    rules = spec.config.rules
    image = prepare_image(sample.image, rules, key=identify(sample) if rules.crop == "random" else "")
    height, width, _ = image.pixels.shape
    row = {
        "bucket": f"{height}x{width}",
        "caption": check_caption(sample.caption),
        "width": image.width,
        "height": image.height,
        "crop": image.crop,
        "pixels": image.pixels,
    }
    return {**row, "mask": _mask(image, spec)} if rules.fit == "pad" else row


def _mask(image: PreparedImage, spec: EncodeSpec) -> np.ndarray:
    """Uint8 [1, h, w]: 1 for each latent that lies within the image, 0 beside it.

    Raises:
        BadImageError: there is none within it.
    """
    height, width, _ = image.pixels.shape
    unit, (left, top, right, bottom) = spec.pixels_per_latent, image.box
    mask = np.zeros((1, height // unit, width // unit), np.uint8)
    mask[:, -(-top // unit) : bottom // unit, -(-left // unit) : right // unit] = 1
    if not mask.any():
        raise BadImageError(
            f"too_narrow: {image.width}x{image.height} px, less than a latent of {unit} px is left of it"
        )
    return mask


def captioned(*, flipped: bool = False, masked: bool = False) -> EncodeKind:
    """The kind of captioned images.

    Args:
        flipped: each is encoded a second time, mirrored left to right.
        masked: they are padded, and a mask is stored with each.
    """
    columns = {"flipped": flipped, "masked": masked}
    pixels = Picture(
        name="pixels", dtype="uint8", mean="latent_mean", std="latent_std", flipped=FLIPPED if flipped else None
    )
    return EncodeKind(
        schema=partial(latent_schema, **columns),
        pictures=(pixels,),
        identify=identify,
        prepare=prepare,
        grows=True,
        captioned=True,
        fingerprint={"flip": True} if flipped else {},
    )
