"""What an imported image becomes: a row of an image table. Imports no torch."""

import hashlib
import io
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
from PIL import Image

from d2f_core.batch.chunks import TableActor
from d2f_core.batch.table_spec import TableSpec
from d2f_core.data.captions import check_caption
from d2f_core.data.image_decoding import STORED_FORMATS, Decoded, decode
from d2f_core.data.image_headers import JPEG, BadImageError
from d2f_core.data.images import prepare_decoded
from d2f_core.data.manifest import rows_per_group
from d2f_core.data.schema import IMAGE_SCHEMA, sample_id
from d2f_core.data.sources.sample import Sample
from d2f_core.import_images.config import ImportImagesConfig
from d2f_core.import_images.looks import perceptual_hash, sharpness

SCHEMA = pa.schema(
    [
        *IMAGE_SCHEMA,
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("original_width", pa.int32(), nullable=False),
        pa.field("original_height", pa.int32(), nullable=False),
        # Of the source's bytes, whatever is made of them: what decides on which side of the split an image goes.
        pa.field("source_hash", pa.string(), nullable=False),
        pa.field("perceptual_hash", pa.uint64(), nullable=False),
        pa.field("sharpness", pa.float32(), nullable=False),
    ]
)
"""An image table with the sizes of the stored and of the original picture in pixels, and what it looks like."""
JPEG_QUALITY = 95


@dataclass(frozen=True, kw_only=True)
class ImportSpec(TableSpec):
    """Specification of a table of all usable images, before it is parted."""

    NAME: ClassVar[str] = "import_images"
    KIND: ClassVar[str] = "images"
    UNIT: ClassVar[str] = "images"

    config: ImportImagesConfig

    def prepared_schema(self) -> pa.Schema:
        return SCHEMA

    @property
    def row_group_rows(self) -> int:
        edge = self.config.resolution or self.config.short_side or 2048
        return rows_per_group(edge * edge)

    def identify(self, sample: Sample) -> str:
        """Hash of the source's bytes; equal files are left out before they are decoded."""
        if sample.image is None:
            raise BadImageError("no_image: none found")
        return sample_id(sample.image, check_caption(sample.caption))

    def prepare(self, sample: Sample) -> dict[str, Any]:
        """The row, with the id of the stored bytes: that is the one by which encoded and real images are compared."""
        assert sample.image is not None  # checked by `identify`
        decoded = decode(sample.image, self.config.rules, reduced=True)
        picture = self._picture(decoded, sample)
        data, caption = stored(picture, decoded, sample.image), check_caption(sample.caption)
        return {
            "sample_id": sample_id(data, caption),
            "caption": caption,
            "image": data,
            "width": picture.width,
            "height": picture.height,
            "original_width": decoded.width,
            "original_height": decoded.height,
            "source_hash": hashlib.sha256(sample.image).hexdigest()[:32],
            "perceptual_hash": perceptual_hash(picture),
            "sharpness": sharpness(picture),
        }

    def _picture(self, decoded: Decoded, sample: Sample) -> Image.Image:
        """The picture as it is stored, in sRGB; `decoded` itself if nothing is to be done."""
        if self.config.resolution:
            key = self.identify(sample) if self.config.crop == "random" else ""
            return Image.fromarray(prepare_decoded(decoded, self.config.rules, key).pixels)
        return decoded.in_srgb(_smaller(decoded.image, self.config.short_side))


def _smaller(image: Image.Image, short_side: int) -> Image.Image:
    shortest = min(image.size)
    if not short_side or shortest <= short_side:
        return image
    width, height = (max(short_side, round(side * short_side / shortest)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def stored(picture: Image.Image, decoded: Decoded, source: bytes) -> bytes:
    """The bytes that are stored: the source's own where its pixels are the picture's, else a new file without metadata.

    A new file of a lossy one is a JPEG of quality 95 without subsampling; of any other, a PNG.

    Args:
        picture: RGB [height, width], as it is stored.
        decoded: the original.
    """
    lossy, plain = source.startswith(JPEG), False
    if not lossy or picture.size == (decoded.width, decoded.height):  # else it may be above Pillow's limit of pixels
        with Image.open(io.BytesIO(source)) as opened:
            lossy = lossy or opened.format == "AVIF" or opened.info.get("compression") == "jpeg"
            lossy = lossy or _is_lossy_webp(source)
            plain = opened.format in STORED_FORMATS and opened.mode in ("RGB", "L")
            plain = plain and "transparency" not in opened.info
    if plain and not decoded.turned and decoded.profile is None and picture.size == (decoded.width, decoded.height):
        return source
    sink = io.BytesIO()
    if lossy:
        picture.save(sink, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        picture.save(sink, "PNG")
    return sink.getvalue()


def _is_lossy_webp(source: bytes) -> bool:
    """Whether a WebP file's picture is a VP8 chunk; chunks with a profile or an alpha channel may stand before it."""
    if source[:4] != b"RIFF" or source[8:12] != b"WEBP":
        return False
    place = 12
    while place + 8 <= len(source) and (name := source[place : place + 4]) != b"VP8L":
        if name == b"VP8 ":
            return True
        length = int.from_bytes(source[place + 4 : place + 8], "little")
        place += 8 + length + length % 2
    return False


class Passing(TableActor):
    """Passes rows on, which are finished when they have been read."""

    def __init__(self, spec: ImportSpec) -> None:
        pass

    def make(self, prepared: pa.Table) -> pa.Table:
        return prepared
