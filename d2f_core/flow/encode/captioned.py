"""Captioned images as samples of an encode job."""

from typing import Any

from d2f_core.data.captions import check_caption
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
    captioned=True,
)
