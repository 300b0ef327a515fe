"""Everything that determines a table of features. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from d2f_core.batch.table_spec import TableSpec
from d2f_core.correspondence.embed.config import FEATURES, EmbedConfig
from d2f_core.correspondence.embed.source import ViewSample, category_of
from d2f_core.data.images import BadImageError, decode_image
from d2f_core.data.manifest import rows_per_group
from d2f_core.data.schema import array_field, sample_id
from d2f_core.data.sources.sample import Sample

EMBEDDING = "embedding"
"""Column of whole images' embeddings, float16 [channels]."""
TEXTS = tuple(pa.field(name, pa.string(), nullable=False) for name in ("sample_id", "source_uri", "category", "mesh"))


@dataclass(frozen=True, kw_only=True)
class EmbedSpec(TableSpec):
    """Specification of a table of features: one row per image."""

    NAME: ClassVar[str] = "embed_images"
    KIND: ClassVar[str] = FEATURES
    UNIT: ClassVar[str] = "images"

    config: EmbedConfig
    shapes: Mapping[str, tuple[int, int]]
    """Tokens and channels of each teacher's features, by the column's name."""
    points: int
    """Points of the surface that are stored with each view; 0: the images are no views."""

    def _views(self) -> list[pa.Field]:
        if not self.points:
            return []
        return [
            array_field("surface_points", "float32", (self.points, 2)),
            array_field("surface_visible", "bool", (self.points,)),
        ]

    def prepared_schema(self) -> pa.Schema:
        picture = [pa.field("image", pa.binary(), nullable=False)]
        return pa.schema([*TEXTS, *self._views(), *picture])

    def schema(self) -> pa.Schema:
        """Of the table."""
        pixels = array_field("pixels", "uint8", (self.config.size, self.config.size, 3))
        features = [array_field(name, "float16", shape) for name, shape in self.shapes.items()]
        chosen = self.config.embedded_column
        embedding = [array_field(EMBEDDING, "float16", self.shapes[chosen][1:])] if chosen else []
        return pa.schema([*TEXTS, *self._views(), pixels, *features, *embedding])

    @property
    def row_group_rows(self) -> int:
        """Few: the buckets of consecutive micro-batches lie all over the table."""
        pixels = 3 * self.config.size**2
        return rows_per_group(pixels + sum(2 * tokens * channels for tokens, channels in self.shapes.values()))

    def identify(self, sample: Sample) -> str:
        if sample.image is None:
            raise BadImageError("no_image: none found")
        return sample_id(sample.image, "")

    def prepare(self, sample: Sample) -> dict[str, Any]:
        """The image's file, and a view's points in pixels of the student's input.

        The image is decoded here, so that a damaged one goes to the ledger, and again by the actor: decoded, a chunk of
        photographs would be larger than what can be passed on in one piece.
        """
        assert sample.image is not None  # checked by `identify`
        image = decode_image(sample.image, self.config.rules)
        row: dict[str, Any] = {"category": category_of(sample), "mesh": "", "image": sample.image}
        if isinstance(sample, ViewSample):
            points = np.frombuffer(sample.surface_points, np.float32).reshape(-1, 2)
            scale = self.config.size / np.array(image.size)
            row["mesh"] = sample.mesh
            row["surface_points"] = (points * scale).astype(np.float32)
            row["surface_visible"] = np.frombuffer(sample.surface_visible, bool)
        return row
