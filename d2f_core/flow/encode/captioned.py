"""Captioned images as samples of an encode job."""

from typing import Any

from d2f_core.data.images import BadImageError, prepare_image
from d2f_core.data.schema import sample_id
from d2f_core.data.sources.sample import Sample
from d2f_core.flow.encode.spec import EncodeKind, EncodeSpec, Picture
from d2f_core.flow.latents import latent_schema


def identify(sample: Sample) -> str:
    """Sample id: hash of image and caption."""
    if sample.image is None:
        raise BadImageError("no_image: none found")
    return sample_id(sample.image, check_caption(sample.caption))


def check_caption(caption: str | None) -> str:
    """The caption without outer white space.

    Raises:
        BadImageError: the caption is missing, empty or not UTF-8.
    """
    if caption is None or not caption.strip():
        raise BadImageError("no_caption: empty" if caption is not None else "no_caption: none found")
    if "\ufffd" in caption:
        raise BadImageError("bad_caption: not UTF-8")
    return caption.strip()


def prepare(sample: Sample, spec: EncodeSpec) -> dict[str, Any]:
    assert sample.image is not None  # checked by `identify`
    image = prepare_image(sample.image, spec.config.rules)
    return {
        "caption": check_caption(sample.caption),
        "width": image.width,
        "height": image.height,
        "crop": image.crop,
        "pixels": image.pixels,
    }


CAPTIONED = EncodeKind(
    schema=latent_schema,
    pictures=(Picture(name="pixels", dtype="uint8", mean="latent_mean", std="latent_std"),),
    identify=identify,
    prepare=prepare,
)
